//! A thread that does one thing after the other.

use std::sync::mpsc::{Sender, channel};
use std::thread::JoinHandle;

use crate::failure::{Failure, host};
use crate::log;

type Job = Box<dyn FnOnce() + Send>;

/// A thread with a queue of things to do. It ends when the worker is dropped and the queue is empty.
#[derive(Debug)]
pub(crate) struct Worker {
    queue: Sender<Job>,
    thread: JoinHandle<()>,
}

impl Worker {
    pub(crate) fn start(name: &str) -> Result<Worker, Failure> {
        let (queue, jobs) = channel::<Job>();
        let thread = std::thread::Builder::new()
            .name(name.to_owned())
            .spawn(log::inherited(move || {
                jobs.into_iter().for_each(|job| job())
            }))
            .map_err(|error| {
                host(
                    format!("no thread: {error}"),
                    "raise the limit of processes",
                )
            })?;
        Ok(Worker { queue, thread })
    }

    /// Does `job` after everything given before.
    pub(crate) fn run(&self, job: impl FnOnce() + Send + 'static) {
        // The thread takes jobs for as long as the worker lives; after a panic in one there is nobody to take them.
        let _ = self.queue.send(Box::new(job));
    }

    /// Waits until everything given is done.
    pub(crate) async fn finish(self) {
        drop(self.queue);
        let thread = self.thread;
        // A panic has been told by the runtime already.
        let _ = tokio::task::spawn_blocking(move || thread.join()).await;
    }
}
