//! What the end-to-end tests share: the corpus, tools, hashes.

#![allow(
    clippy::unwrap_used,
    reason = "in tests a panic with a line number is the report"
)]

pub mod client;
pub mod corpus;
pub mod crash;
pub mod daemon;
pub mod damage;
pub mod fio;
pub mod fsx;
pub mod holder;
pub mod hosts;
pub mod minbase;
pub mod model;
pub mod mount;
pub mod openvz;
pub mod server;
pub mod store;
pub mod stream;
pub mod tools;
pub mod treehash;
