//! Reading and writing little-endian bytes under limits: [`Reader`] for what the peer sent, [`Writer`] for our own.

/// Why bytes are not a message. Always the peer's fault.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// The message ends before its fields do.
    #[error("the message ends inside the field {0}")]
    Truncated(&'static str),
    /// There are bytes after the last field.
    #[error("{0} bytes follow the message's last field")]
    TrailingBytes(usize),
    /// The message's type is not in the table.
    #[error("unknown message type {0}")]
    UnknownType(u16),
    /// A length or a figure is above its limit.
    #[error("{field} is {value}, above its limit of {limit}")]
    AboveLimit {
        /// The field.
        field: &'static str,
        /// What the peer sent.
        value: u64,
        /// What is allowed.
        limit: u64,
    },
    /// A value that the field cannot have.
    #[error("{field} is not valid: {why}")]
    Invalid {
        /// The field.
        field: &'static str,
        /// The rule that is broken.
        why: &'static str,
    },
}

/// Takes values off the front of a message.
#[derive(Debug)]
pub(super) struct Reader<'a> {
    left: &'a [u8],
}

impl<'a> Reader<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Reader<'a> {
        Reader { left: bytes }
    }

    /// Takes `len` bytes. Nothing is copied.
    pub(super) fn take(&mut self, field: &'static str, len: usize) -> Result<&'a [u8], WireError> {
        let (head, tail) = self
            .left
            .split_at_checked(len)
            .ok_or(WireError::Truncated(field))?;
        self.left = tail;
        Ok(head)
    }

    /// Takes `N` bytes as an array.
    pub(super) fn array<const N: usize>(
        &mut self,
        field: &'static str,
    ) -> Result<[u8; N], WireError> {
        let (head, tail) = self
            .left
            .split_first_chunk()
            .ok_or(WireError::Truncated(field))?;
        self.left = tail;
        Ok(*head)
    }

    /// Takes a `u32` count that must be at most `limit`, of elements of at least `element` bytes each: a count that the
    /// rest of the message cannot hold is refused before anything is allocated for it.
    pub(super) fn count(
        &mut self,
        field: &'static str,
        limit: usize,
        element: usize,
    ) -> Result<usize, WireError> {
        let value = u32::from_le_bytes(self.array(field)?);
        let count = usize::try_from(value).unwrap_or(usize::MAX);
        if count > limit {
            return Err(WireError::AboveLimit {
                field,
                value: value.into(),
                limit: limit as u64,
            });
        }
        if count.saturating_mul(element) > self.left.len() {
            return Err(WireError::Truncated(field));
        }
        Ok(count)
    }

    /// Ends the message: nothing may be left.
    pub(super) fn end(self) -> Result<(), WireError> {
        if self.left.is_empty() {
            Ok(())
        } else {
            Err(WireError::TrailingBytes(self.left.len()))
        }
    }
}

/// Appends values to a message.
#[derive(Debug, Default)]
pub(super) struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    pub(super) fn put(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
    }

    /// Appends a `u32` count. Our own lists are within their limits, which are far below `u32::MAX`.
    pub(super) fn count(&mut self, count: usize, limit: usize) {
        debug_assert!(count <= limit, "{count} elements, {limit} allowed");
        self.put(&u32::try_from(count).unwrap_or(u32::MAX).to_le_bytes());
    }

    pub(super) fn finish(self) -> Vec<u8> {
        self.bytes
    }
}
