"""What is to be reached, beside what was. A goal whose peer did not run has no answer."""

import statistics

from servers import NULL, PLOOP_NAME
from tools import table

BEST = "the best peer"


def value(figures):
    return statistics.median(f["value"] if isinstance(f, dict) else f for f in figures)


def ratio(by_server, peer):
    """Ours by the peer's, and who that was; None when it did not run."""
    mine = value(by_server[PLOOP_NAME])
    others = {name: value(f) for name, f in by_server.items()
              if f and name not in (PLOOP_NAME, NULL)}
    if peer == BEST:
        name = max(others, key=others.get, default=None)
        return name and (mine / others[name], f" ({name})")
    return (mine / others[peer], "") if peer in others else None


def at_least(work, factor, peer, by_server):
    """A line: so many times as fast as a peer."""
    goal = f"≥ {factor:g} × {peer}"
    found = ratio(by_server, peer)
    if not found:
        return [work, goal, "its peer did not run", "–"]
    return [work, goal, f"{found[0]:.2f}{found[1]}", yes(found[0] >= factor)]


def at_most(work, limit, unit, reached, digits=2):
    """A line: no more than so much."""
    return [work, f"≤ {limit:g}{unit}", f"{reached:.{digits}f}{unit}", yes(reached <= limit)]


def yes(is_so):
    return "yes" if is_so else "**no**"


def lines(*rows):
    return ["", *table(["goal for", "goal", "reached", "met"], *rows)]
