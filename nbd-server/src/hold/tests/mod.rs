//! Tests of the holder without processes.

mod hostile;
mod model;
mod rules;
mod server;
mod truth;
