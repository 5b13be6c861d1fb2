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

/// Seats, places on the doorstep, connections by address, connections by user.
fn counts(limits: &ConnectionLimits) -> [u32; 4] {
    [
        limits.counted.load(Relaxed),
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
fn past_the_cap_of_an_address_others_come_in() {
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
        "the refused never counted"
    );
    limits.release(two, "");
    assert_eq!(limits.acquire(ip("192.0.2.1")).unwrap(), one);
}

#[test]
fn loopback_has_a_cap_only_when_one_is_given() {
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
fn past_the_doorstep_nobody_waits() {
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
fn trusted_proxies_name_clients_and_are_never_counted_themselves() {
    let limits = limits(&["--trusted-proxy", "10.0.0.0/8,fd00::/8", "--max-connections-per-ip", "1"]);
    let proxy = || limits.acquire(ip("10.0.0.1")).unwrap();
    let silent = [proxy(), proxy(), limits.acquire(ip("::ffff:10.0.0.1")).unwrap()];
    assert_eq!(silent, [ConnectionSlot::Proxy; 3]);
    let (mut first, mut second, mut chained) = (proxy(), proxy(), proxy());
    limits.name_client(&mut first, ip("192.0.2.1")).unwrap();
    limits.name_client(&mut second, ip("192.0.2.1")).unwrap();
    assert!(first.limit_reached().is_none() && !first.is_proxy());
    assert_eq!(
        second,
        ConnectionSlot::Rejecting { limit: LimitReached::Address, proxy: false, reported: true }
    );
    // A proxy that comes through another names the client in its turn.
    limits.name_client(&mut chained, ip("fd00::1")).unwrap();
    assert_eq!(chained, ConnectionSlot::Proxy);
    limits.name_client(&mut chained, ip("192.0.2.2")).unwrap();
    assert_eq!(chained, ConnectionSlot::Client(ip("192.0.2.2").into()));
    assert_eq!(counts(&limits), [5, 1, 2, 0]);
    // With the doorstep full, whoever is named past its cap is told at once.
    let mut more: Vec<_> = (0..limits.max_rejecting).map(|_| proxy()).collect();
    let told = more
        .iter_mut()
        .filter_map(|connection_slot| limits.name_client(connection_slot, ip("192.0.2.1")).err())
        .count();
    assert_eq!(told, 1);
    for connection_slot in [first, second, chained].into_iter().chain(silent).chain(more) {
        limits.release(connection_slot, "");
    }
    assert_eq!(counts(&limits), [0; 4]);
}

#[test]
fn users_have_a_cap_where_tokens_say_who_they_are() {
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
fn an_answer_says_when_to_come_back() {
    for (limit, status) in
        [(LimitReached::Node, "503"), (LimitReached::Address, "429"), (LimitReached::User, "429")]
    {
        let answer = String::from_utf8(limit.answer().to_vec()).unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
        assert!(answer.contains("\r\nRetry-After: 5\r\n") && answer.ends_with('\n'), "{answer}");
    }
}

proptest! {
    /// However connections come, are named and leave: no cap is passed, and in the end nothing is left.
    #[test]
    fn what_was_taken_is_given_back(steps in prop::collection::vec((0..4u8, 0..4u8, 0..16usize), 0..200)) {
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
                        let _ = limits.name_client(connection_slot, address(number));
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
