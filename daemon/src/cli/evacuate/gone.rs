//! What has become of a guest that was to leave, so far or in the end.

use pagecopy::engine::event::State;
use serde::Serialize;
use serde_json::Value;
use uuid::Uuid;

use super::plan::Leaving;
use crate::migrations::Finished;

/// What has become of a guest.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Gone {
    /// Its name.
    pub(super) vm: String,
    /// Where it goes, once that is chosen.
    pub(super) to: Option<String>,
    /// Its migration, if there was one.
    pub(super) id: Option<Uuid>,
    /// The migration's state.
    #[serde(rename = "status")]
    pub(super) state: State,
    /// How long it was thought to take, in milliseconds.
    pub(super) predicted_ms: Option<f64>,
    /// Its memory.
    pub(super) ram_bytes: Option<u64>,
    /// How long it took, once it had begun, in milliseconds.
    pub(super) total_ms: Option<f64>,
    /// How long the guest stood still.
    pub(super) downtime_ms: Option<f64>,
    /// Bytes on all channels.
    pub(super) bytes_on_wire: Option<u64>,
    /// Why it has not moved.
    pub(super) error: Option<String>,
    /// What to do about it.
    pub(super) remedy: Option<String>,
    /// The migrations that failed and were tried again.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub(super) attempts: Vec<Value>,
}

impl Gone {
    pub(super) fn of(leaving: &Leaving) -> Gone {
        Gone {
            vm: leaving.vm.clone(),
            to: None,
            id: leaving.id,
            state: State::Pending,
            predicted_ms: leaving.predicted_ms,
            ram_bytes: leaving.ram_bytes,
            total_ms: None,
            downtime_ms: None,
            bytes_on_wire: None,
            error: None,
            remedy: None,
            attempts: Vec::new(),
        }
    }

    #[cfg(test)]
    pub(super) fn ended(state: State) -> Gone {
        let found = crate::guests::GuestFound {
            vm: "web1".to_owned(),
            qmp: "/q".into(),
            state: None,
            ram_bytes: Some(1 << 30),
            migration: None,
            error: None,
            remedy: None,
        };
        Gone {
            state,
            ..Gone::of(&Leaving::of(found))
        }
    }

    /// Whether there is nothing more to wait for. One in doubt may yet be decided, by whoever asks the destination.
    pub(super) fn is_over(&self) -> bool {
        matches!(
            self.state,
            State::Completed | State::Failed | State::Cancelled | State::InDoubt
        )
    }

    pub(super) fn fail(&mut self, state: State, what: &str, remedy: &str) {
        self.state = state;
        self.error = Some(what.to_owned());
        self.remedy = Some(remedy.to_owned()).filter(|remedy| !remedy.is_empty());
    }

    pub(super) fn finish(&mut self, finished: &Finished) {
        let figures = &finished.figures;
        self.total_ms = Some(figures.total_ms).filter(|ms| *ms > 0.0);
        self.downtime_ms = figures.downtime_ms;
        self.bytes_on_wire = Some(finished.bytes_on_wire);
        self.error.clone_from(&finished.error);
        self.remedy.clone_from(&finished.remedy);
    }

    /// Says what will become of one that has not ended, and that nobody follows any more.
    pub(super) fn leave_alone(&mut self, why: &str) {
        let (what, remedy) = match self.id {
            Some(id) => (
                format!("{why}; pagecopyd goes on with it"),
                format!("see `pagecopy status {id}`"),
            ),
            None => (
                format!("{why}; it was not begun"),
                "evacuate again".to_owned(),
            ),
        };
        self.fail(self.state, &what, &remedy);
    }
}
