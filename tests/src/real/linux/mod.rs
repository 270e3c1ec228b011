//! A whole guest: Debian's kernel with busybox and fio (`scripts/guest`), a network card on a bridge and two disks, as
//! somebody would run one, and the world outside that talks to it.

mod download;
mod guest;
mod ping;
mod switch;

pub use download::Download;
pub use guest::{LinuxGuest, LinuxState};
pub use ping::{Ping, Pinged};
pub use switch::Switch;
