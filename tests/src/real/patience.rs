//! The only place where tests sleep: to let a fault last, and to look again at what tells nobody when it changes, such as
//! a process's descriptors or the answer of a command line.

use std::time::{Duration, Instant};

/// How often is looked.
const LOOK: Duration = Duration::from_millis(100);

/// Looks until `look` returns something, for `limit` and, on a machine that stood still for some of that time, for as many
/// looks as half of it allows.
///
/// # Errors
/// It has not: the last reason why not.
pub fn eventually<T>(
    limit: Duration,
    mut look: impl FnMut() -> Result<T, String>,
) -> Result<T, String> {
    let deadline = Instant::now() + limit;
    let enough = limit.as_millis() / LOOK.as_millis() / 2;
    let mut looks = 0;
    loop {
        looks += 1;
        match look() {
            Err(why) if Instant::now() >= deadline && looks >= enough => return Err(why),
            Err(_) => std::thread::sleep(LOOK),
            Ok(found) => return Ok(found),
        }
    }
}

/// Lets what is the case last for `time`.
pub fn let_it_last(time: Duration) {
    std::thread::sleep(time);
}
