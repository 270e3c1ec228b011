//! stub
use crate::connect::socket::Bounded;
use crate::error::Error;
use crate::tls::Identity;
use crate::tls::link::TlsLink;

pub(crate) fn client(
    _bounded: Bounded,
    _identity: &Identity,
) -> Result<(TlsLink, Vec<String>), Error> {
    Err(Error::Closed)
}
pub(crate) fn server(
    _bounded: Bounded,
    _identity: &Identity,
) -> Result<(TlsLink, Vec<String>), (Option<TlsLink>, Error)> {
    Err((None, Error::Closed))
}
