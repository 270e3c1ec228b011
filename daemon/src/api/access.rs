//! Who may use the API, and for what: `[access]` in the configuration.
//!
//! A caller on the unix socket is known by what the kernel says of it when it connects (`SO_PEERCRED`, `SO_PEERGROUPS`), one over
//! TLS by its certificate. What only looks (GET) needs the role `read`; everything else needs `operate`, which has `read` in it,
//! and leaves an audit line in the log, whether or not it was let in. Root and the daemon's own user may do everything: they
//! could take the daemon itself.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, PoisonError, RwLock};

use axum::extract::{ConnectInfo, Request, State};
use axum::http::header::LOCATION;
use axum::http::{Method, Uri};
use axum::middleware::Next;
use axum::response::{IntoResponse, Json, Response};
use nix::unistd::{Group, Uid, User};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use uuid::Uuid;

use super::peer::Peer;
use super::problem::{ApiError, Kind, Problems};
use crate::config::access::{Access, Who};
use crate::failure::{Failure, operator};
use crate::service::Service;

/// What a caller may do.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize, ToSchema)]
#[serde(rename_all = "kebab-case")]
pub enum Role {
    /// Look.
    Read,
    /// Look, and have things done.
    Operate,
}

impl fmt::Display for Role {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Role::Read => "read",
            Role::Operate => "operate",
        })
    }
}

/// Those who have a role.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
struct Members {
    users: BTreeSet<u32>,
    groups: BTreeSet<u32>,
    /// In lower case.
    names: BTreeSet<String>,
}

impl Members {
    fn look_up(key: &str, all: &[Who]) -> Result<Members, Failure> {
        let absent = |what: &str, name: &str, why: &dyn fmt::Display| {
            operator(
                format!("[access]: {key} names the {what} {name:?}: {why}"),
                format!("make that {what}, or name another"),
            )
        };
        let mut members = Members::default();
        for who in all {
            match who {
                Who::User(name) => match User::from_name(name) {
                    Ok(Some(user)) => drop(members.users.insert(user.uid.as_raw())),
                    Ok(None) => return Err(absent("user", name, &"there is none")),
                    Err(error) => return Err(absent("user", name, &error)),
                },
                Who::Group(name) => match Group::from_name(name) {
                    Ok(Some(group)) => drop(members.groups.insert(group.gid.as_raw())),
                    Ok(None) => return Err(absent("group", name, &"there is none")),
                    Err(error) => return Err(absent("group", name, &error)),
                },
                Who::Certificate(name) => drop(members.names.insert(name.to_ascii_lowercase())),
            }
        }
        Ok(members)
    }

    fn have(&self, peer: &Peer) -> bool {
        match peer {
            Peer::Local { uid, groups, .. } => {
                self.users.contains(uid) || groups.iter().any(|gid| self.groups.contains(gid))
            }
            Peer::Remote { names, .. } => names.iter().any(|name| self.names.contains(name)),
        }
    }
}

/// Who has which role, as the configuration says it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Roles(Option<[Members; 2]>);

impl Roles {
    /// Finds the users and groups that `access` names. Without the table whoever can open the socket may do everything.
    ///
    /// # Errors
    /// One that does not exist.
    pub(crate) fn look_up(access: Option<&Access>) -> Result<Roles, Failure> {
        let Some(Access { read, operate, .. }) = access else {
            return Ok(Roles(None));
        };
        Ok(Roles(Some([
            Members::look_up("read", read)?,
            Members::look_up("operate", operate)?,
        ])))
    }

    /// The role of a caller, if it has one.
    fn of(&self, peer: &Peer) -> Option<Role> {
        let is_ours = matches!(peer, Peer::Local { uid, .. } if *uid == 0 || *uid == Uid::effective().as_raw());
        match (&self.0, peer) {
            (None, Peer::Local { .. }) => Some(Role::Operate),
            (None, Peer::Remote { .. }) => None,
            (Some(_), _) if is_ours => Some(Role::Operate),
            (Some([_, operate]), peer) if operate.have(peer) => Some(Role::Operate),
            (Some([read, _]), peer) if read.have(peer) => Some(Role::Read),
            _ => None,
        }
    }
}

/// The roles that are in force. A reload changes them for connections that are open, too.
#[derive(Debug, Default)]
pub struct RolesInForce(RwLock<Arc<Roles>>);

impl RolesInForce {
    pub(crate) fn new(roles: Roles) -> RolesInForce {
        RolesInForce(RwLock::new(Arc::new(roles)))
    }

    fn now(&self) -> Arc<Roles> {
        Arc::clone(&self.0.read().unwrap_or_else(PoisonError::into_inner))
    }

    pub(crate) fn set(&self, roles: Roles) {
        *self.0.write().unwrap_or_else(PoisonError::into_inner) = Arc::new(roles);
    }
}

/// Lets those in who may, and writes down who has asked for what.
pub(super) async fn check(
    State(service): State<Arc<Service>>,
    ConnectInfo(peer): ConnectInfo<Peer>,
    mut request: Request,
    next: Next,
) -> Response {
    let role = service.roles.now().of(&peer);
    let (method, uri) = (request.method().clone(), request.uri().clone());
    let needed = match method {
        Method::GET | Method::HEAD | Method::OPTIONS => Role::Read,
        _ => Role::Operate,
    };
    let answer = match role {
        Some(role) if role >= needed => {
            request.extensions_mut().insert(role);
            next.run(request).await
        }
        _ => forbidden(&peer, role, needed).into_response(),
    };
    if role.is_none() || needed == Role::Operate {
        audit(&peer, role, &method, &uri, &answer);
    }
    answer
}

fn forbidden(peer: &Peer, role: Option<Role>, needed: Role) -> ApiError {
    let what = match role {
        Some(role) => format!("{peer} has the role {role}, and this needs {needed}"),
        None => format!("{peer} has no role here"),
    };
    let how = match peer {
        Peer::Local { .. } => "the user, or a group that it is in (user:NAME, group:NAME)",
        Peer::Remote { .. } => "a DNS name of its certificate (cert:NAME)",
    };
    ApiError::new(
        Kind::Forbidden,
        what,
        format!(
            "have {how} put into the list {needed} of [access] in pagecopyd's configuration, and reload it"
        ),
    )
}

/// A line in the log, with the migration's id where it is about one.
fn audit(peer: &Peer, role: Option<Role>, method: &Method, uri: &Uri, answer: &Response) {
    let begun = answer.headers().get(LOCATION);
    let begun = begun.and_then(|place| place.to_str().ok());
    let about = begun.unwrap_or(uri.path()).strip_prefix("/v1/migrations/");
    let id = about.and_then(|rest| Uuid::parse_str(rest.split('/').next()?).ok());
    tracing::info!(
        target: "pagecopyd::audit",
        id = id.map(tracing::field::display), who = %peer,
        role = role.map(tracing::field::display), %method, path = uri.path(),
        status = answer.status().as_u16(), "asked"
    );
}

/// Who asks, as this daemon sees it.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Caller {
    /// The user on the socket, or the names in the certificate.
    who: String,
    /// What it may do.
    role: Role,
}

/// Who you are to this daemon, and what you may do.
#[utoipa::path(
    get, path = "/v1/caller", tag = "daemon", operation_id = "caller",
    responses((status = 200, description = "Who asks, and its role.", body = Caller), Problems)
)]
pub(super) async fn caller(
    ConnectInfo(peer): ConnectInfo<Peer>,
    axum::Extension(role): axum::Extension<Role>,
) -> Json<Caller> {
    Json(Caller {
        who: peer.to_string(),
        role,
    })
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use super::*;

    fn local(uid: u32, groups: &[u32]) -> Peer {
        Peer::Local {
            uid,
            pid: None,
            groups: groups.to_vec(),
        }
    }

    fn remote(name: &str) -> Peer {
        Peer::Remote {
            names: vec![name.to_owned()],
            from: "192.0.2.1:5".parse().unwrap(),
        }
    }

    fn members(users: &[u32], groups: &[u32], names: &[&str]) -> Members {
        Members {
            users: users.iter().copied().collect(),
            groups: groups.iter().copied().collect(),
            names: names.iter().map(|&name| name.to_owned()).collect(),
        }
    }

    #[test]
    fn by_user_by_any_group_and_by_name() {
        let roles = Roles(Some([
            members(&[1001], &[50], &["watcher"]),
            members(&[], &[60], &["boss"]),
        ]));
        for (peer, role) in [
            (local(0, &[]), Some(Role::Operate)),
            (local(Uid::effective().as_raw(), &[]), Some(Role::Operate)),
            (local(1001, &[9]), Some(Role::Read)),
            (local(1002, &[9, 50]), Some(Role::Read)),
            (local(1002, &[9, 50, 60]), Some(Role::Operate)),
            (local(1002, &[9]), None),
            (remote("watcher"), Some(Role::Read)),
            (remote("boss"), Some(Role::Operate)),
            (remote("other"), None),
        ] {
            assert_eq!(roles.of(&peer), role, "{peer}");
        }
    }

    #[test]
    fn without_the_table_the_sockets_permissions_decide() {
        let roles = Roles::look_up(None).unwrap();
        assert_eq!(roles.of(&local(1001, &[])), Some(Role::Operate));
        assert_eq!(roles.of(&remote("boss")), None);
    }

    #[test]
    fn who_does_not_exist_is_named() {
        let with = |who: Who| Access {
            read: vec![who],
            ..Access::default()
        };
        for (who, word) in [
            (Who::User("no-such-user".into()), "user \"no-such-user\""),
            (
                Who::Group("no-such-group".into()),
                "group \"no-such-group\"",
            ),
        ] {
            let failure = Roles::look_up(Some(&with(who))).unwrap_err();
            assert!(failure.what.contains(word), "{failure:?}");
        }
        let root = Roles::look_up(Some(&with(Who::User("root".into())))).unwrap();
        assert!(root.0.unwrap()[0].users.contains(&0));
    }
}
