use proptest::prelude::*;

use super::*;
use crate::config::{Action, Settings};

fn guard(flags: &[&str]) -> ConnectionLimits {
    match Settings::from(flags.iter().map(std::ffi::OsString::from), []) {
        Ok(Action::Run(settings)) => ConnectionLimits::new(&settings),
        other => panic!("{other:?}"),
    }
}

fn ip(text: &str) -> IpAddr {
    text.parse().unwrap()
}

/// Seats, places on the doorstep, connections by address, connections by user.
fn counts(guard: &ConnectionLimits) -> [u32; 4] {
    [
        guard.seats.load(Relaxed),
        guard.doorstep.load(Relaxed),
        guard.addresses.lock().unwrap().values().sum(),
        guard.users.lock().unwrap().values().sum(),
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
    let guard = guard(&["--max-connections-per-ip", "2"]);
    let one = guard.acquire(ip("192.0.2.1")).unwrap();
    let two = guard.acquire(ip("::ffff:192.0.2.1")).unwrap();
    let three = guard.acquire(ip("192.0.2.1")).unwrap();
    assert_eq!((one.full(), two.full(), three.full()), (None, None, Some(LimitReached::Address)));
    assert_eq!(guard.acquire(ip("192.0.2.2")).unwrap().full(), None);
    let home = ["2001:db8::1", "2001:db8:0:1::1", "2001:db8:0:ff::1"]
        .map(|text| guard.acquire(ip(text)).unwrap().full());
    assert_eq!(home, [None, None, Some(LimitReached::Address)]);
    guard.release(three, "");
    assert_eq!(
        guard.acquire(ip("192.0.2.1")).unwrap().full(),
        Some(LimitReached::Address),
        "the refused never counted"
    );
    guard.release(two, "");
    assert_eq!(guard.acquire(ip("192.0.2.1")).unwrap(), one);
}

#[test]
fn loopback_has_a_cap_only_when_one_is_given() {
    let all_in = |guard: &ConnectionLimits, many| {
        (0..many).all(|_| guard.acquire(ip("127.0.0.1")).unwrap().full().is_none())
    };
    let most = PER_ADDRESS + 1;
    let of_node = ["--max-connections", "100000"];
    assert!(all_in(&guard(&of_node), most));
    let explicit = guard(&[&of_node[..], &["--max-connections-per-ip", "1024"]].concat());
    assert!(all_in(&explicit, most - 1) && !all_in(&explicit, 1));
    let auto = guard(&of_node);
    let seated = (0..most).filter(|_| auto.acquire(ip("192.0.2.1")).unwrap().full().is_none()).count();
    assert_eq!(seated, PER_ADDRESS as usize);
}

#[test]
fn past_the_doorstep_nobody_waits() {
    let guard = guard(&["--max-connections", "3"]);
    let seats: Vec<_> = (0..3).map(|_| guard.acquire(ip("192.0.2.1")).unwrap()).collect();
    let waiting: Vec<_> = (0..guard.max_doorstep).map(|_| guard.acquire(ip("192.0.2.2")).unwrap()).collect();
    assert!(seats.iter().all(|place| place.full().is_none()));
    assert!(waiting.iter().all(|place| place.full() == Some(LimitReached::Node)));
    assert_eq!(guard.acquire(ip("192.0.2.3")), Err(LimitReached::Node));
    guard.release(waiting[0], "");
    assert_eq!(guard.acquire(ip("192.0.2.3")).unwrap().full(), Some(LimitReached::Node));
    guard.release(seats[0], "");
    assert_eq!(guard.acquire(ip("192.0.2.3")).unwrap().full(), None);
}

#[test]
fn trusted_proxies_name_clients_and_are_never_counted_themselves() {
    let guard = guard(&["--trusted-proxy", "10.0.0.0/8,fd00::/8", "--max-connections-per-ip", "1"]);
    let proxy = || guard.acquire(ip("10.0.0.1")).unwrap();
    let silent = [proxy(), proxy(), guard.acquire(ip("::ffff:10.0.0.1")).unwrap()];
    assert_eq!(silent, [ConnectionSlot::Proxy; 3]);
    let (mut first, mut second, mut chained) = (proxy(), proxy(), proxy());
    guard.name(&mut first, ip("192.0.2.1")).unwrap();
    guard.name(&mut second, ip("192.0.2.1")).unwrap();
    assert!(first.full().is_none() && !first.is_proxy());
    assert_eq!(second, ConnectionSlot::Doorstep { full: LimitReached::Address, proxy: false, named: true });
    // A proxy that comes through another names the client in its turn.
    guard.name(&mut chained, ip("fd00::1")).unwrap();
    assert_eq!(chained, ConnectionSlot::Proxy);
    guard.name(&mut chained, ip("192.0.2.2")).unwrap();
    assert_eq!(chained, ConnectionSlot::Client(ip("192.0.2.2").into()));
    assert_eq!(counts(&guard), [5, 1, 2, 0]);
    // With the doorstep full, whoever is named past its cap is told at once.
    let mut more: Vec<_> = (0..guard.max_doorstep).map(|_| proxy()).collect();
    let told = more.iter_mut().filter_map(|place| guard.name(place, ip("192.0.2.1")).err()).count();
    assert_eq!(told, 1);
    for place in [first, second, chained].into_iter().chain(silent).chain(more) {
        guard.release(place, "");
    }
    assert_eq!(counts(&guard), [0; 4]);
}

#[test]
fn users_have_a_cap_where_tokens_say_who_they_are() {
    let seated = |guard: &ConnectionLimits, user| (0..150).filter(|_| guard.seat_user(user)).count();
    assert_eq!(seated(&guard(&[]), "alice"), 150);
    let with_tokens = guard(&["--jwt-key", "/some/file"]);
    assert_eq!((seated(&with_tokens, "alice"), seated(&with_tokens, "bob")), (100, 100));
    assert_eq!(seated(&guard(&["--jwt-key", "/some/file", "--max-connections-per-user", "0"]), "alice"), 150);
    let given = guard(&["--max-connections-per-user", "3"]);
    assert_eq!(seated(&given, "alice"), 3);
    let place = given.acquire(ip("192.0.2.1")).unwrap();
    given.release(place, "alice");
    assert!(given.seat_user("alice") && !given.seat_user("alice"));
}

#[test]
fn allowances_belong_to_users_or_addresses() {
    let place = |text: &str| ConnectionSlot::Client(ip(text).into());
    let same = |guard: &ConnectionLimits, [(a, alice), (b, bob)]: [(&str, &str); 2]| {
        let one = guard.allowance(place(a), alice).expect("one");
        Arc::ptr_eq(&one, &guard.allowance(place(b), bob).expect("another"))
    };
    let with_tokens = guard(&["--jwt-key", "/some/file"]);
    assert!(same(&with_tokens, [("192.0.2.1", "alice"), ("127.0.0.1", "alice")]));
    assert!(!same(&with_tokens, [("192.0.2.1", "alice"), ("192.0.2.1", "bob")]));
    let without = guard(&[]);
    assert!(same(&without, [("192.0.2.1", "alice"), ("192.0.2.1", "bob")]));
    assert!(same(&without, [("2001:db8::1", "alice"), ("2001:db8:0:ff::1", "bob")]));
    assert!(!same(&without, [("192.0.2.1", "alice"), ("192.0.2.2", "alice")]));
    for place in [place("127.0.0.1"), place("::1"), ConnectionSlot::Proxy] {
        assert!(without.allowance(place, "alice").is_none(), "{place:?}");
    }
}

#[test]
fn an_answer_says_when_to_come_back() {
    for (full, status) in
        [(LimitReached::Node, "503"), (LimitReached::Address, "429"), (LimitReached::User, "429")]
    {
        let answer = String::from_utf8(full.answer().to_vec()).unwrap();
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")), "{answer}");
        assert!(answer.contains("\r\nRetry-After: 5\r\n") && answer.ends_with('\n'), "{answer}");
    }
}

proptest! {
    /// However connections come, are named and leave: no cap is passed, and in the end nothing is left.
    #[test]
    fn what_was_taken_is_given_back(steps in prop::collection::vec((0..4u8, 0..4u8, 0..16usize), 0..200)) {
        let guard = guard(&[
            "--trusted-proxy", "10.0.0.0/8", "--max-connections", "8", "--max-connections-per-ip", "3", "--max-connections-per-user", "2",
        ]);
        let address = |number: u8| ip(["10.0.0.1", "192.0.2.1", "192.0.2.2", "2001:db8::1"][number as usize]);
        let mut there: Vec<(ConnectionSlot, &str)> = Vec::new();
        for (step, number, at) in steps {
            match step {
                0 | 1 => there.extend(guard.acquire(address(number)).map(|place| (place, ""))),
                2 if at < there.len() => {
                    let (place, user) = &mut there[at];
                    if place.is_proxy() {
                        let _ = guard.name(place, address(number));
                    } else if user.is_empty() && guard.seat_user("alice") {
                        *user = "alice";
                    }
                }
                _ if at < there.len() => {
                    let (place, user) = there.swap_remove(at);
                    guard.release(place, user);
                }
                _ => {}
            }
            let [seats, doorstep, _, users] = counts(&guard);
            prop_assert_eq!((seats + doorstep) as usize, there.len());
            prop_assert!(seats <= 8 && users <= 2);
            prop_assert!(guard.addresses.lock().unwrap().values().all(|count| (1..=3).contains(count)));
        }
        there.into_iter().for_each(|(place, user)| guard.release(place, user));
        prop_assert_eq!(counts(&guard), [0; 4]);
    }
}
