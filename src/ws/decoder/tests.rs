use super::*;
use proptest::prelude::*;

fn frame(first: u8, payload: &[u8]) -> Vec<u8> {
    let mask = [7u8, 99, 0, 201];
    let mut frame = vec![first];
    match payload.len() {
        len @ 0..=125 => frame.push(0x80 | len as u8),
        len @ 126..=0xFFFF => {
            frame.push(0x80 | 126);
            frame.extend((len as u16).to_be_bytes());
        }
        len => {
            frame.push(0x80 | 127);
            frame.extend((len as u64).to_be_bytes());
        }
    }
    frame.extend(mask);
    frame.extend(payload.iter().zip(mask.iter().cycle()).map(|(byte, mask)| byte ^ mask));
    frame
}

/// Decodes `bytes` in pieces that end at these places, as a shard does with its buffer.
fn read_in_pieces(bytes: &[u8], cuts: &[usize]) -> (Result<(), CloseReason>, Vec<Incoming>, bool) {
    let limits = Limits { max_message_size: 1000, binary: false };
    let (mut partial, mut messages) = (None, Vec::new());
    let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut % (bytes.len() + 1)).collect();
    cuts.push(bytes.len());
    cuts.sort_unstable();
    let mut rest = Vec::new();
    let mut start = 0;
    for cut in cuts {
        let mut piece = [&rest[..], &bytes[start..cut]].concat();
        start = cut;
        loop {
            let mut some = Vec::new();
            let read = read(&mut partial, &mut piece, limits, &mut some);
            let full = some.len() == MESSAGES_AT_ONCE;
            messages.append(&mut some);
            match read {
                Ok(read) => piece.drain(..read),
                Err(reason) => return (Err(reason), messages, partial.is_some()),
            };
            if matches!(messages.last(), Some(Incoming::Close(_))) {
                return (Ok(()), messages, partial.is_some());
            }
            if !full {
                break;
            }
        }
        rest = piece;
    }
    assert!(rest.is_empty(), "complete frames are decoded completely");
    (Ok(()), messages, partial.is_some())
}

fn text(text: &str, frames: u32) -> Incoming {
    Incoming::Text(text.to_owned(), frames)
}

fn ping(payload: &[u8]) -> Incoming {
    Incoming::Ping(payload.into())
}

#[test]
fn a_ping_may_come_between_fragments() {
    let bytes =
        [frame(0x01, b"one "), frame(0x89, b"p"), frame(0x00, b"two "), frame(0x80, b"three")].concat();
    for cuts in [&[][..], &[12], &[18]] {
        let (result, messages, kept) = read_in_pieces(&bytes, cuts);
        assert_eq!((result, messages), (Ok(()), vec![ping(b"p"), text("one two three", 3)]));
        assert!(!kept, "nothing is kept between messages");
    }
}

#[test]
fn nothing_is_decoded_after_a_close() {
    for (payload, code) in [(&[][..], None), (&[0x03, 0xE8], Some(1000)), (b"\x0F\xA1bye", Some(4001))] {
        let bytes = [frame(0x88, payload), frame(0x81, b"hi"), frame(0x89, b"")].concat();
        let (result, messages, _) = read_in_pieces(&bytes, &[]);
        assert_eq!((result, messages), (Ok(()), vec![Incoming::Close(code)]));
    }
}

#[test]
fn the_number_of_fragments_is_limited() {
    let most = FRAGMENTS_MAX + 1000 / FRAGMENT_BYTES;
    let fragments = |many| [frame(0x01, b""), frame(0x00, b"").repeat(many - 2), frame(0x80, b"")].concat();
    assert_eq!(read_in_pieces(&fragments(most + 1), &[]).0, Ok(()));
    assert_eq!(read_in_pieces(&fragments(most + 2), &[]).0, Err(CloseReason::MessageTimeout));
}

#[test]
fn protocol_errors_have_their_reason() {
    let mut unmasked = frame(0x81, b"");
    unmasked[1] &= 0x7F;
    let huge = [0x81, 0xFF, 0x7F, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0, 0, 0, 0];
    for (bytes, expected) in [
        (unmasked, CloseReason::Protocol),
        (frame(0xC1, b"rsv"), CloseReason::Protocol),
        (frame(0x83, b"opcode"), CloseReason::Protocol),
        (vec![0x81, 0xFE, 0, 1, 0, 0, 0, 0, b'a'], CloseReason::Protocol),
        (vec![0x81, 0xFF, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 0, b'a'], CloseReason::Protocol),
        (frame(0x8B, b"opcode"), CloseReason::Protocol),
        (frame(0x89, &[0; 126]), CloseReason::Protocol),
        (frame(0x09, b"fragmented ping"), CloseReason::Protocol),
        (frame(0x80, b"nothing to continue"), CloseReason::Protocol),
        ([frame(0x01, b"a"), frame(0x81, b"b")].concat(), CloseReason::Protocol),
        (frame(0x88, &[0x03]), CloseReason::Protocol),
        (frame(0x88, &1005u16.to_be_bytes()), CloseReason::Protocol),
        (frame(0x88, &[0x03, 0xE8, 0xFF]), CloseReason::InvalidText),
        (frame(0x82, b"binary"), CloseReason::Binary),
        (frame(0x81, &[0xFF]), CloseReason::InvalidText),
        ([frame(0x01, &[0xC3]), frame(0x80, b"a")].concat(), CloseReason::InvalidText),
        (frame(0x81, &[b'a'; 1001]), CloseReason::MessageTooBig),
        (huge.to_vec(), CloseReason::MessageTooBig),
        ([frame(0x01, &[b'a'; 600]), frame(0x80, &[b'a'; 600])].concat(), CloseReason::MessageTooBig),
    ] {
        assert_eq!(read_in_pieces(&bytes, &[]).0, Err(expected), "{bytes:x?}");
    }
}

proptest! {
    /// The messages are the same however the network cuts the bytes.
    #[test]
    fn messages_do_not_depend_on_how_bytes_arrive(
        sent in prop::collection::vec(("\\PC{0,300}", 0usize..4), 1..80),
        cuts in prop::collection::vec(any::<usize>(), 0..20),
    ) {
        let mut bytes = Vec::new();
        for (words, shape) in &sent {
            let words = words.as_bytes();
            let words = &words[..words.len().min(1000)];
            let middle = words.len() / 2;
            match shape {
                0 | 1 => bytes.extend(frame(0x81, words)),
                2 => bytes.extend([frame(0x01, &words[..middle]), frame(0x80, &words[middle..])].concat()),
                _ => bytes.extend([frame(0x89, b"ping"), frame(0x81, words), frame(0x8A, b"")].concat()),
            }
        }
        let whole = read_in_pieces(&bytes, &[]);
        let cut = read_in_pieces(&bytes, &cuts);
        prop_assert_eq!(&whole.0, &cut.0);
        if whole.0.is_ok() {
            let texts = whole.1.iter().filter(|message| matches!(message, Incoming::Text(..)));
            prop_assert_eq!(texts.count(), sent.len());
            prop_assert_eq!(whole.1, cut.1);
            prop_assert!(!cut.2, "nothing is kept between messages");
        }
    }
}
