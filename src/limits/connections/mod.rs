//! Limits on the number of connections: of the node, of a client's address, of a user. All shards
//! share the counts. A connection changes them when it is accepted, when a proxy reports its
//! client, when its user is known, and when its socket is closed; deliveries don't touch them.
//!
//! A connection over a limit is kept until its request has come, so that it gets a proper response.
//! Only some may wait like that: beyond them the accept loop responds at once.

use std::collections::HashMap;
use std::fmt;
use std::hash::{BuildHasher, Hash, RandomState};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};
use std::sync::{Arc, LazyLock, Mutex};

use bytes::Bytes;
use ipnet::IpNet;

use crate::config::{self, Cap, Settings};
use crate::http::{Rejection, Response};
use crate::limits::allowances::Allowances;
use crate::limits::bans::Bans;
use crate::limits::followed::FollowedChannels;
use crate::limits::rate::{self, Allowance, AllowanceOwner};
use crate::protocol::close::CloseReason;

/// Default of `--max-connections-per-ip`: more than a large office behind one address has. Loopback
/// addresses are not limited by default, since a proxy on the same machine may not be in
/// `--trusted-proxy`.
pub const PER_ADDRESS: u32 = 1024;

/// Default of `--max-connections-per-user`, with tokens only: without them a client could use
/// another user's id and lock that user out.
pub const PER_USER: u32 = 100;

/// Places in a table of counts that are kept. Of more, those for clients who left are freed.
const PLACES: usize = 1024;

/// Seconds after which a rejected client may try again.
const RETRY_AFTER: &str = "5";

/// Bytes of an IPv6 address that identify a client: the /56 that a customer of an access network
/// usually gets (RIPE-690 recommends /56 or /48). By /64 such a customer would have 256 times the
/// limit.
const IPV6_PREFIX: usize = 7;

/// The address under which a client is counted: an IPv4 address, or the /56 of an IPv6 address, so
/// that a client gains nothing by using other addresses of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Address {
    /// An IPv4 address, also one mapped into IPv6.
    V4([u8; 4]),
    /// The first bytes of an IPv6 address.
    V6([u8; IPV6_PREFIX]),
}

impl Address {
    fn is_loopback(self) -> bool {
        match self {
            Address::V4([first, ..]) => first == 127,
            Address::V6(prefix) => prefix == [0; IPV6_PREFIX], // of ::1; no other host has it
        }
    }
}

impl From<IpAddr> for Address {
    fn from(ip: IpAddr) -> Address {
        match ip.to_canonical() {
            IpAddr::V4(ip) => Address::V4(ip.octets()),
            IpAddr::V6(ip) => {
                let prefix = ip.octets().first_chunk().copied();
                Address::V6(prefix.expect("an address is longer than its prefix"))
            }
        }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match *self {
            Address::V4(octets) => Ipv4Addr::from(octets).fmt(f),
            Address::V6(_) if self.is_loopback() => Ipv6Addr::LOCALHOST.fmt(f),
            Address::V6(prefix) => {
                let mut octets = [0; 16];
                octets[..IPV6_PREFIX].copy_from_slice(&prefix);
                write!(f, "{}/{}", Ipv6Addr::from(octets), 8 * IPV6_PREFIX)
            }
        }
    }
}

/// The limit that a connection is over.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LimitReached {
    /// The node: `--max-connections`.
    Node,
    /// The client's address: `--max-connections-per-ip`.
    Address,
    /// The user: `--max-connections-per-user`.
    User,
}

impl LimitReached {
    pub fn reason(self) -> CloseReason {
        match self {
            LimitReached::Node => CloseReason::NodeLimit,
            LimitReached::Address => CloseReason::IpLimit,
            LimitReached::User => CloseReason::UserLimit,
        }
    }

    /// The rejection of a connection over this limit.
    pub fn rejection(self) -> &'static Rejection {
        &self.rejected().0
    }

    /// The response to a connection over this limit. Serialized once, since a flood needs many.
    pub fn response(self) -> Bytes {
        self.rejected().1.clone()
    }

    fn rejected(self) -> &'static (Rejection, Bytes) {
        static REJECTED: LazyLock<[(Rejection, Bytes); 3]> = LazyLock::new(|| {
            [
                (LimitReached::Node, 503, "this node is at its connection limit: try another, or later"),
                (
                    LimitReached::Address,
                    429,
                    "too many connections from this address: close some, or try later",
                ),
                (LimitReached::User, 429, "too many connections of this user: close some, or try later"),
            ]
            .map(|(limit, status, text)| {
                let rejection = Rejection::new(status, text).with("Retry-After", RETRY_AFTER);
                let rejection = rejection.because(limit.reason());
                let response = Response::from(&rejection).to_bytes(false);
                (rejection, response)
            })
        });
        &REJECTED[self as usize]
    }
}

/// What a connection adds to the counts, from accept until its socket is closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ConnectionSlot {
    /// A connection of a trusted proxy that has not reported a client: counted for the node alone.
    Proxy,
    /// Counted for the node and for this address.
    Client(Address),
    /// A connection over a limit. It waits for its request, to be rejected.
    Rejecting {
        limit: LimitReached,
        /// The peer is a trusted proxy.
        proxy: bool,
        /// The client address was reported by a trusted proxy.
        reported: bool,
    },
}

impl ConnectionSlot {
    /// Whether the peer is a trusted proxy, which may report the client.
    pub fn is_proxy(self) -> bool {
        matches!(self, ConnectionSlot::Proxy | ConnectionSlot::Rejecting { proxy: true, .. })
    }

    /// The limit that the connection is over.
    pub fn limit_reached(self) -> Option<LimitReached> {
        match self {
            ConnectionSlot::Rejecting { limit, .. } => Some(limit),
            ConnectionSlot::Proxy | ConnectionSlot::Client(_) => None,
        }
    }
}

/// The counts and their limits.
#[derive(Debug)]
pub struct ConnectionLimits {
    trusted: Box<[IpNet]>,
    max_connections: u32,
    max_rejecting: u32,
    per_address: Cap,
    /// `None` if users are not counted.
    per_user: Option<u32>,
    connections: AtomicU32,
    rejecting: AtomicU32,
    addresses: Mutex<HashMap<Address, u32>>,
    /// Keyed by a hash of 64 bits, since user ids are long. Two users with the same hash share a
    /// limit.
    users: Mutex<HashMap<u64, u32>>,
    hasher: RandomState,
    /// Whose connections share an allowance.
    owner: AllowanceOwner,
    pub allowances: Allowances,
    pub followed: FollowedChannels,
    /// Changed by the bus.
    pub bans: Arc<Bans>,
    /// Channels that one connection may follow.
    channels_per_connection: u32,
    /// Channels that may count for one client.
    most_held: u32,
}

/// The part of `--max-channels` that may count for one client. Without this limit one with a few
/// connections could hold all of them.
const HELD_PART: usize = 4;

impl ConnectionLimits {
    pub fn new(settings: &Settings) -> ConnectionLimits {
        ConnectionLimits {
            trusted: settings.trusted_proxy.clone().into(),
            max_connections: settings.connection_limit(),
            max_rejecting: config::rejection_slots(settings.connection_limit()),
            per_address: settings.max_connections_per_ip,
            per_user: match settings.max_connections_per_user {
                Cap::Auto => (!settings.jwt_key.is_empty()).then_some(PER_USER),
                Cap::Off => None,
                Cap::Most(most) => Some(most.get()),
            },
            connections: AtomicU32::new(0),
            rejecting: AtomicU32::new(0),
            addresses: Mutex::default(),
            users: Mutex::default(),
            hasher: RandomState::new(),
            owner: AllowanceOwner::of(settings),
            allowances: Allowances::new(settings),
            followed: FollowedChannels::default(),
            bans: Arc::default(),
            // A connection may have all its subscriptions, however small --max-channels is.
            most_held: u32::try_from(
                (settings.max_channels.get() / HELD_PART).max(settings.max_subscriptions),
            )
            .unwrap_or(u32::MAX),
            channels_per_connection: u32::try_from(settings.max_subscriptions)
                .unwrap_or(u32::MAX)
                .saturating_add(1),
        }
    }

    /// Whether this is a trusted proxy, which may report its clients.
    pub fn trusts(&self, ip: IpAddr) -> bool {
        let ip = ip.to_canonical();
        self.trusted.iter().any(|net| net.contains(&ip))
    }

    /// Counts a new connection. [`ConnectionLimits::release`] undoes it. Called by the accept loop
    /// alone.
    ///
    /// # Errors
    /// The limit reached, if as many connections as may are waiting to be rejected.
    pub fn acquire(&self, peer: IpAddr) -> Result<ConnectionSlot, LimitReached> {
        let proxy = self.trusts(peer);
        let address = Address::from(peer);
        let limit = if self.connections.load(Relaxed) >= self.max_connections {
            LimitReached::Node
        } else if proxy || self.count(address) {
            self.connections.fetch_add(1, Relaxed);
            return Ok(if proxy { ConnectionSlot::Proxy } else { ConnectionSlot::Client(address) });
        } else {
            LimitReached::Address
        };
        if self.rejecting.load(Relaxed) >= self.max_rejecting {
            return Err(limit);
        }
        self.rejecting.fetch_add(1, Relaxed);
        Ok(ConnectionSlot::Rejecting { limit, proxy, reported: false })
    }

    /// Counts a connection of a trusted proxy for the client that the proxy reports. A connection
    /// over a limit keeps its limit.
    ///
    /// # Errors
    /// The limit reached, if as many connections as may are waiting to be rejected: respond at
    /// once.
    pub fn set_client(
        &self,
        connection_slot: &mut ConnectionSlot,
        client: IpAddr,
    ) -> Result<(), LimitReached> {
        debug_assert!(connection_slot.is_proxy(), "{connection_slot:?} is not a proxy's");
        let proxy = self.trusts(client); // a proxy's own address is never counted
        match connection_slot {
            ConnectionSlot::Rejecting { limit, .. } => {
                *connection_slot = ConnectionSlot::Rejecting { limit: *limit, proxy, reported: true }
            }
            _ if proxy => {}
            _ if self.count(client.into()) => *connection_slot = ConnectionSlot::Client(client.into()),
            _ => {
                self.connections.fetch_sub(1, Relaxed);
                *connection_slot =
                    ConnectionSlot::Rejecting { limit: LimitReached::Address, proxy, reported: true };
                if self.rejecting.fetch_add(1, Relaxed) >= self.max_rejecting {
                    return Err(LimitReached::Address);
                }
            }
        }
        Ok(())
    }

    /// Removes a connection from the counts. `user` is empty unless
    /// [`ConnectionLimits::acquire_user`] counted it.
    pub fn release(&self, connection_slot: ConnectionSlot, user: &str) {
        match connection_slot {
            ConnectionSlot::Rejecting { .. } => {
                self.rejecting.fetch_sub(1, Relaxed);
            }
            ConnectionSlot::Proxy => {
                self.connections.fetch_sub(1, Relaxed);
            }
            ConnectionSlot::Client(address) => {
                self.connections.fetch_sub(1, Relaxed);
                subtract(&self.addresses, &address);
            }
        }
        if self.per_user.is_some() && !user.is_empty() {
            subtract(&self.users, &self.hasher.hash_one(user));
        }
    }

    /// Counts a connection of this user. `false` if that is one too many.
    pub fn acquire_user(&self, user: &str) -> bool {
        self.per_user.is_none_or(|most| add(&self.users, self.hasher.hash_one(user), most))
    }

    /// The allowance of the client of this connection. `None` if the connection shares none:
    /// without tokens one from loopback, since a proxy on the same machine may not forward client
    /// addresses, and a proxy's own connection.
    pub fn allowance(&self, connection_slot: ConnectionSlot, user: &str) -> Option<Arc<Allowance>> {
        match (self.owner, connection_slot) {
            (AllowanceOwner::User, _) => Some(self.allowances.get(user)),
            (AllowanceOwner::Address, ConnectionSlot::Client(address)) if !address.is_loopback() => {
                Some(self.allowances.get(address))
            }
            (AllowanceOwner::Address, _) => None,
        }
    }

    /// Whether one more channel may count for this client.
    pub fn may_hold(&self, client: &Allowance) -> bool {
        client.held() < self.most_held
    }

    /// Counts a new channel of this client. `false` if it has named too many. Where its connections
    /// are not limited, new channels are not either.
    pub fn take_channel(&self, client: &Allowance) -> bool {
        let connections = match self.owner {
            AllowanceOwner::User => self.per_user,
            AllowanceOwner::Address => self.most_per_address(),
        };
        let Some(connections) = connections else { return true };
        let most = rate::channels_a_minute(self.owner, connections, self.channels_per_connection);
        client.take_channel(most, self.allowances.now())
    }

    /// Counts a connection of this address. `false` if that is one too many.
    fn count(&self, address: Address) -> bool {
        let is_unlimited = self.per_address == Cap::Auto && address.is_loopback();
        let most = self.most_per_address().filter(|_| !is_unlimited);
        add(&self.addresses, address, most.unwrap_or(u32::MAX))
    }

    /// Most connections of an address, loopback aside.
    fn most_per_address(&self) -> Option<u32> {
        match self.per_address {
            Cap::Auto => Some(PER_ADDRESS),
            Cap::Off => None,
            Cap::Most(most) => Some(most.get()),
        }
    }
}

fn add<K: Hash + Eq>(counts: &Mutex<HashMap<K, u32>>, key: K, most: u32) -> bool {
    let mut counts = counts.lock().expect("nothing panics while holding it");
    let count = counts.entry(key).or_insert(0);
    let is_free = *count < most;
    *count += u32::from(is_free);
    is_free
}

fn subtract<K: Hash + Eq>(counts: &Mutex<HashMap<K, u32>>, key: &K) {
    let mut counts = counts.lock().expect("nothing panics while holding it");
    let count = counts.get_mut(key).expect("every connection was counted");
    *count -= 1;
    if *count == 0 {
        counts.remove(key);
        if counts.capacity() > PLACES.max(8 * counts.len()) {
            let places = 2 * counts.len();
            counts.shrink_to(places);
        }
    }
}

#[cfg(test)]
pub(crate) mod tests;
