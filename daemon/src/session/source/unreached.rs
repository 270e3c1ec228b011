//! An attempt that made no connection: the destination's pagecopyd may be there all the same, and an operator who says that it
//! is fenced is wrong then.

use pagecopy::engine::source::Input;

use crate::dial::Unreached;

impl From<Unreached> for Input {
    fn from(unreached: Unreached) -> Input {
        let Unreached { failure, answers } = unreached;
        match answers {
            true => Input::ReconnectRefused(failure.what),
            false => Input::ReconnectFailed(failure.what),
        }
    }
}
