use proptest::prelude::*;

use super::*;
use crate::config::{Action, Settings};

fn limits(flags: &[&str]) -> ConnectionLimits {
    match Settings::from(flags.iter().map(std::ffi::OsString::from), []) {
        Ok(Action::Run(settings)) => ConnectionLimits::new(&settings),
        other => panic!("{other:?}"),
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Counted connections, those waiting to be rejected, connections by address and by user.
pub(crate) fn counts(limits: &ConnectionLimits) -> [u32; 4] {
    [
        limits.connections.load(Relaxed),
        limits.rejecting.load(Relaxed),
        limits.addresses.lock().unwrap().values().sum(),
        limits.users.lock().unwrap().values().sum(),
    ]
}

#[test]
fn addresses_are_ipv4_or_the_56_of_ipv6() {
    let shown = |text: &str| Address::from(ip(text)).to_string();
    assert_eq!(shown("192.0.2.1"), "192.0.2.1");
    assert_eq!(shown("::ffff:192.0.2.1"), "192.0.2.1");
    assert_eq!(shown("2001:db8:1:2:3:4:5:6"), "2001:db8:1::/56");
    assert_eq!(shown("::1"), "::1");
    assert_eq!(Address::from(ip("2001:db8::1")), Address::from(ip("2001:db8:0:ff:ffff:0:0:2")));
    assert_ne!(Address::from(ip("2001:db8::1")), Address::from(ip("2001:db8:0:100::1")));
    for (text, loopback) in
        [("127.9.9.9", true), ("::1", true), ("::ffff:127.0.0.1", true), ("128.0.0.1", false)]
    {
        assert_eq!(Address::from(ip(text)).is_loopback(), loopback, "{text}");
    }
    assert_eq!(size_of::<ConnectionSlot>(), 8, "each connection holds one");
}

#[test]
fn address_limit_leaves_other_addresses_alone() {
    let limits = limits(&["--max-connections-per-ip", "2"]);
    let one = limits.acquire(ip("192.0.2.1")).unwrap();
    let two = limits.acquire(ip("::ffff:192.0.2.1")).unwrap();
    let three = limits.acquire(ip("192.0.2.1")).unwrap();
    assert_eq!(
        (one.limit_reached(), two.limit_reached(), three.limit_reached()),
        (None, None, Some(LimitReached::Address))
    );
    assert_eq!(limits.acquire(ip("192.0.2.2")).unwrap().limit_reached(), None);
    let home = ["2001:db8::1", "2001:db8:0:1::1", "2001:db8:0:ff::1"]
        .map(|text| limits.acquire(ip(text)).unwrap().limit_reached());
    assert_eq!(home, [None, None, Some(LimitReached::Address)]);
    limits.release(three, "");
    assert_eq!(
        limits.acquire(ip("192.0.2.1")).unwrap().limit_reached(),
        Some(LimitReached::Address),
        "rejected connections are not counted for an address"
    );
    limits.release(two, "");
    assert_eq!(limits.acquire(ip("192.0.2.1")).unwrap(), one);
}

#[test]
fn loopback_is_limited_only_by_a_setting() {
    let all_in = |limits: &ConnectionLimits, many| {
        (0..many).all(|_| limits.acquire(ip("127.0.0.1")).unwrap().limit_reached().is_none())
    };
    let most = PER_ADDRESS + 1;
    let of_node = ["--max-connections", "100000"];
    assert!(all_in(&limits(&of_node), most));
    let explicit = limits(&[&of_node[..], &["--max-connections-per-ip", "1024"]].concat());
    assert!(all_in(&explicit, most - 1) && !all_in(&explicit, 1));
    let auto = limits(&of_node);
    let acquired =
        (0..most).filter(|_| auto.acquire(ip("192.0.2.1")).unwrap().limit_reached().is_none()).count();
    assert_eq!(acquired, PER_ADDRESS as usize);
}

#[test]
fn beyond_the_rejection_slots_nothing_waits() {
    let limits = limits(&["--max-connections", "3"]);
    let counted: Vec<_> = (0..3).map(|_| limits.acquire(ip("192.0.2.1")).unwrap()).collect();
    let waiting: Vec<_> =
        (0..limits.max_rejecting).map(|_| limits.acquire(ip("192.0.2.2")).unwrap()).collect();
    assert!(counted.iter().all(|connection_slot| connection_slot.limit_reached().is_none()));
    assert!(
        waiting.iter().all(|connection_slot| connection_slot.limit_reached() == Some(LimitReached::Node))
    );
    assert_eq!(limits.acquire(ip("192.0.2.3")), Err(LimitReached::Node));
    limits.release(waiting[0], "");
    assert_eq!(limits.acquire(ip("192.0.2.3")).unwrap().limit_reached(), Some(LimitReached::Node));
    limits.release(counted[0], "");
    assert_eq!(limits.acquire(ip("192.0.2.3")).unwrap().limit_reached(), None);
}

#[test]
fn proxies_report_clients_and_are_not_counted() {
    let limits = limits(&["--trusted-proxy", "10.0.0.0/8,fd00::/8", "--max-connections-per-ip", "1"]);
    let proxy = || limits.acquire(ip("10.0.0.1")).unwrap();
    let silent = [proxy(), proxy(), limits.acquire(ip("::ffff:10.0.0.1")).unwrap()];
    assert_eq!(silent, [ConnectionSlot::Proxy; 3]);
    let (mut first, mut second, mut chained) = (proxy(), proxy(), proxy());
    limits.set_client(&mut first, ip("192.0.2.1")).unwrap();
    limits.set_client(&mut second, ip("192.0.2.1")).unwrap();
    assert!(first.limit_reached().is_none() && !first.is_proxy());
    assert_eq!(
        second,
        ConnectionSlot::Rejecting { limit: LimitReached::Address, proxy: false, reported: true }
    );
    // A proxy behind another proxy reports the client in its turn.
    limits.set_client(&mut chained, ip("fd00::1")).unwrap();
    assert_eq!(chained, ConnectionSlot::Proxy);
    limits.set_client(&mut chained, ip("192.0.2.2")).unwrap();
    assert_eq!(chained, ConnectionSlot::Client(ip("192.0.2.2").into()));
    assert_eq!(counts(&limits), [5, 1, 2, 0]);
    // Without a free rejection slot a connection over the limit is rejected at once.
    let mut more: Vec<_> = (0..limits.max_rejecting).map(|_| proxy()).collect();
    let at_once = more
        .iter_mut()
        .filter_map(|connection_slot| limits.set_client(connection_slot, ip("192.0.2.1")).err())
        .count();
    assert_eq!(at_once, 1);
    for connection_slot in [first, second, chained].into_iter().chain(silent).chain(more) {
        limits.release(connection_slot, "");
    }
    assert_eq!(counts(&limits), [0; 4]);
}

#[test]
fn users_are_limited_with_tokens() {
    let acquired = |limits: &ConnectionLimits, user| (0..150).filter(|_| limits.acquire_user(user)).count();
    assert_eq!(acquired(&limits(&[]), "alice"), 150);
    let with_tokens = limits(&["--jwt-key", "/some/file"]);
    assert_eq!((acquired(&with_tokens, "alice"), acquired(&with_tokens, "bob")), (100, 100));
    assert_eq!(
        acquired(&limits(&["--jwt-key", "/some/file", "--max-connections-per-user", "0"]), "alice"),
        150
    );
    let given = limits(&["--max-connections-per-user", "3"]);
    assert_eq!(acquired(&given, "alice"), 3);
    let connection_slot = given.acquire(ip("192.0.2.1")).unwrap();
    given.release(connection_slot, "alice");
    assert!(given.acquire_user("alice") && !given.acquire_user("alice"));
}

#[test]
fn allowances_belong_to_users_or_addresses() {
    let client_slot = |text: &str| ConnectionSlot::Client(ip(text).into());
    let same = |limits: &ConnectionLimits, [(a, alice), (b, bob)]: [(&str, &str); 2]| {
        let one = limits.allowance(client_slot(a), alice).expect("one");
        Arc::ptr_eq(&one, &limits.allowance(client_slot(b), bob).expect("another"))
    };
    let with_tokens = limits(&["--jwt-key", "/some/file"]);
    assert!(same(&with_tokens, [("192.0.2.1", "alice"), ("127.0.0.1", "alice")]));
    assert!(!same(&with_tokens, [("192.0.2.1", "alice"), ("192.0.2.1", "bob")]));
    let without = limits(&[]);
    assert!(same(&without, [("192.0.2.1", "alice"), ("192.0.2.1", "bob")]));
    assert!(same(&without, [("2001:db8::1", "alice"), ("2001:db8:0:ff::1", "bob")]));
    assert!(!same(&without, [("192.0.2.1", "alice"), ("192.0.2.2", "alice")]));
    for connection_slot in [client_slot("127.0.0.1"), client_slot("::1"), ConnectionSlot::Proxy] {
        assert!(without.allowance(connection_slot, "alice").is_none(), "{connection_slot:?}");
    }
}

#[test]
fn rejections_have_retry_after() {
    for (limit, status) in
        [(LimitReached::Node, "503"), (LimitReached::Address, "429"), (LimitReached::User, "429")]
    {
        let response = String::from_utf8(limit.response().to_vec()).unwrap();
        assert!(response.starts_with(&format!("HTTP/1.1 {status} ")), "{response}");
        assert!(response.contains("\r\nRetry-After: 5\r\n") && response.ends_with('\n'), "{response}");
    }
}

proptest! {
    /// Whatever connections do, no limit is passed, and in the end all counts are 0.
    #[test]
    fn released_connections_leave_no_count(steps in prop::collection::vec((0..4u8, 0..4u8, 0..16usize), 0..200)) {
        let limits = limits(&[
            "--trusted-proxy", "10.0.0.0/8", "--max-connections", "8", "--max-connections-per-ip", "3", "--max-connections-per-user", "2",
        ]);
        let address = |number: u8| ip(["10.0.0.1", "192.0.2.1", "192.0.2.2", "2001:db8::1"][number as usize]);
        let mut there: Vec<(ConnectionSlot, &str)> = Vec::new();
        for (step, number, at) in steps {
            match step {
                0 | 1 => there.extend(limits.acquire(address(number)).map(|connection_slot| (connection_slot, ""))),
                2 if at < there.len() => {
                    let (connection_slot, user) = &mut there[at];
                    if connection_slot.is_proxy() {
                        let _ = limits.set_client(connection_slot, address(number));
                    } else if user.is_empty() && limits.acquire_user("alice") {
                        *user = "alice";
                    }
                }
                _ if at < there.len() => {
                    let (connection_slot, user) = there.swap_remove(at);
                    limits.release(connection_slot, user);
                }
                _ => {}
            }
            let [counted, rejecting, _, users] = counts(&limits);
            prop_assert_eq!((counted + rejecting) as usize, there.len());
            prop_assert!(counted <= 8 && users <= 2);
            prop_assert!(limits.addresses.lock().unwrap().values().all(|count| (1..=3).contains(count)));
        }
        there.into_iter().for_each(|(connection_slot, user)| limits.release(connection_slot, user));
        prop_assert_eq!(counts(&limits), [0; 4]);
    }
}
