//! What the two ends say to each other beside what they measure: JSON, in messages of a channel over TCP.

use std::net::SocketAddr;
use std::time::Duration;

use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use transport::{Channel, Event, Op, SubmitError, Token};

use super::perftest::Test;

/// How long an answer may take.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);

/// What the far end is asked for.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Ask {
    /// A channel, over RDMA or TCP.
    Channel { rdma: bool },
    /// The seconds of CPU that it has used.
    Cpu,
    /// perftest's program, waiting for its client.
    Perftest(Test),
}

/// What it answers.
#[derive(Debug, Serialize, Deserialize)]
pub(super) enum Answer {
    Listening(SocketAddr),
    Cpu(f64),
    Started,
    Failed(String),
}

pub(super) fn say(channel: &mut dyn Channel, what: &impl Serialize) -> Result<(), String> {
    let text = serde_json::to_vec(what).map_err(|error| error.to_string())?;
    submit(channel, Op::Send(text.into())).map(|_| ())
}

pub(super) fn hear<T: DeserializeOwned>(
    channel: &mut dyn Channel,
    patience: Option<Duration>,
) -> Result<T, String> {
    loop {
        match channel.poll(patience).map_err(|error| error.to_string())? {
            Some(Event::Message(bytes)) => {
                return serde_json::from_slice(&bytes).map_err(|error| error.to_string());
            }
            Some(_) => {}
            None => return Err("the other end does not answer".to_owned()),
        }
    }
}

/// Submits, as soon as there is room. Returns how many operations have ended meanwhile.
pub(super) fn submit(channel: &mut dyn Channel, mut op: Op) -> Result<usize, String> {
    let mut ended = 0;
    loop {
        op = match channel.submit(Token(0), op) {
            Ok(()) => return Ok(ended),
            Err(SubmitError::Full(again)) => again,
            Err(SubmitError::Closed) => {
                let why = channel.poll(Some(Duration::ZERO)).err();
                return Err(why.map_or("closed".to_owned(), |error| error.to_string()));
            }
            Err(error) => return Err(error.to_string()),
        };
        let event = channel
            .poll(Some(PATIENCE))
            .map_err(|error| error.to_string())?;
        ended += usize::from(event.is_some());
    }
}
