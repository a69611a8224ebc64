//! Containers that were taken, or are ready, and lack something: it comes by their feeds.

use super::*;

impl Destination {
    pub(super) fn fed(&self) -> MutexGuard<'_, HashMap<Guid, Arc<Feed>>> {
        self.feeds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Goes on with the containers that were taken and lack something, for a service that starts: their
    /// sources come back by themselves.
    pub fn resume(self: &Arc<Self>) -> Result<()> {
        let root = self.root()?;
        for (name, record) in moving::unsettled(root)? {
            if !matches!(record.state, State::Taken | State::Ready) {
                continue;
            }
            let begun = Place::container(root, &name).and_then(|place| {
                if later::missing(&place)?.is_empty() {
                    return Ok(());
                }
                tracing::info!(container = name, id = %record.id, "some of it is still to come");
                self.begin_feed(&place, &name, record.id).map(drop)
            });
            // One that is damaged does not keep the others from being served.
            if let Err(e) = begun {
                tracing::error!(container = name, error = %e, "what it lacks does not come");
            }
        }
        Ok(())
    }

    /// Has what the container lacks come, in the background too, as soon as there is a link.
    fn begin_feed(self: &Arc<Self>, place: &Place<'_>, name: &str, id: Guid) -> Result<Arc<Feed>> {
        let none = || Error::unsupported("this service does not fetch what containers lack");
        let store = place.opener().arrivals().ok_or_else(none)?.clone();
        let feed = Feed::new();
        let paths = feed::register(place, &store, &feed)?;
        self.fed().insert(id, feed.clone());
        let (me, name, with) = (self.clone(), name.to_owned(), feed.clone());
        let thread = std::thread::Builder::new().name("post-copy".into());
        let filler = thread.spawn(move || me.fill(&with, &store, &paths, &name, id));
        let filler = filler.map_err(|e| {
            // The next link tries again.
            self.forget(id, &feed);
            Error::new(Kind::Io, "start a thread").caused_by(e)
        })?;
        let mut fillers = self.fillers.lock().unwrap_or_else(PoisonError::into_inner);
        fillers.retain(|f| !f.is_finished());
        fillers.push(filler);
        Ok(feed)
    }

    /// What the container still lacks comes by this; `None` where it lacks nothing, durably. What is said
    /// to the source follows from it, and the source drops what nobody needs: so its files are asked, and
    /// what cannot be told is an error.
    pub(super) fn feed_of(
        self: &Arc<Self>,
        root: &Root,
        name: &str,
        id: Guid,
    ) -> Result<Option<Arc<Feed>>> {
        let place = Place::container(root, name)?;
        if later::missing(&place)?.is_empty() {
            return Ok(None);
        }
        let feed = self.fed().get(&id).cloned();
        match feed {
            Some(feed) => Ok(Some(feed)),
            None => self.begin_feed(&place, name, id).map(Some),
        }
    }

    /// Nothing comes by `feed` any more.
    fn forget(&self, id: Guid, feed: &Arc<Feed>) {
        let mut feeds = self.fed();
        if feeds.get(&id).is_some_and(|f| Arc::ptr_eq(f, feed)) {
            feeds.remove(&id);
        }
    }

    /// The background of one container.
    fn fill(
        &self,
        feed: &Arc<Feed>,
        store: &ArrivingStore,
        paths: &[PathBuf],
        name: &str,
        id: Guid,
    ) {
        let Ok(root) = self.root() else { return };
        // A record that cannot be read says nothing.
        let over = || {
            moving::record(root, name, id).is_ok_and(|r| {
                r.is_none_or(|r| !matches!(r.state, State::Ready | State::Taken | State::Arriving))
            })
        };
        let filled = feed::fill(feed, store, paths, &over);
        if filled {
            tracing::info!(container = name, id = %id, "all of it is here");
            self.disks.go_on_merging(name);
            let told = self.tell_whole(root, feed, name, id);
            if let Err(e) = told {
                tracing::debug!(container = name, error = %e, "the source does not know yet: it asks");
            }
        }
        self.forget(id, feed);
    }

    /// Tells the source, if it is there, that it is not needed any more.
    fn tell_whole(&self, root: &Root, feed: &Feed, name: &str, id: Guid) -> Result<()> {
        let place = Place::container(root, name)?;
        if moving::record(root, name, id)?.is_none() || !later::missing(&place)?.is_empty() {
            return Ok(());
        }
        feed.whole()?;
        moving::confirmed(root, name, id)?;
        feed.done()
    }

    /// Answers that the container is this service's, and by this link comes from then on what it lacks.
    pub(super) fn has_it(
        self: &Arc<Self>,
        wire: &mut Wire,
        root: &Root,
        name: &str,
        id: Guid,
        epoch: u64,
        end: &Arc<End>,
    ) -> Result<()> {
        let Some(feed) = self.feed_of(root, name, id)? else {
            return self.answer(wire, root, name, id, Answer::Taken(epoch));
        };
        wire.say(Type::Answer, &Answered::from(Answer::Needs(epoch)))?;
        feed.give(wire.take(), end.clone());
        Ok(())
    }
}
