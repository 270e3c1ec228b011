//! A userfaultfd and its ioctls.

use std::os::fd::OwnedFd;

/// A userfaultfd. Its ioctls act on the address space that created it, whoever calls them.
#[derive(Debug)]
pub struct Uffd(#[allow(dead_code)] OwnedFd);
