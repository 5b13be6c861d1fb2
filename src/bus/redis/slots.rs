//! Hash slots of a Redis Cluster (cluster-spec, "Key distribution model").

use crate::protocol::event::ChannelName;

/// Number of slots.
pub const SLOTS: u16 = 16_384;

/// The slot of a channel's keys: its name is their hash tag.
pub fn slot_of(channel: &ChannelName) -> u16 {
    crc16(channel.as_str().as_bytes()) % SLOTS
}

/// CRC-16/XMODEM.
fn crc16(bytes: &[u8]) -> u16 {
    bytes.iter().fold(0, |crc, byte| {
        (0..8).fold(
            crc ^ u16::from(*byte) << 8,
            |crc: u16, _| {
                if crc & 0x8000 == 0 { crc << 1 } else { crc << 1 ^ 0x1021 }
            },
        )
    })
}

/// The number of each slot's primary.
#[derive(Debug, PartialEq, Eq)]
pub struct SlotMap(Vec<usize>);

impl SlotMap {
    /// All slots at one primary.
    pub fn all_at(primary: usize) -> SlotMap {
        SlotMap(vec![primary; SLOTS.into()])
    }

    /// Gives the slots from `first` to `last` to a primary.
    pub fn assign(&mut self, first: u16, last: u16, primary: usize) {
        let range = usize::from(first)..=usize::from(last.min(SLOTS - 1));
        self.0.get_mut(range).into_iter().flatten().for_each(|slot| *slot = primary);
    }

    pub fn primary_of(&self, channel: &ChannelName) -> usize {
        self.0[usize::from(slot_of(channel))]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slots_are_those_of_redis() {
        // CLUSTER KEYSLOT of Redis 7.0.15, and the check value of CRC-16/XMODEM.
        assert_eq!(crc16(b"123456789"), 0x31c3);
        for (channel, slot) in [("foo", 12182), ("room", 15960), ("ws_broadcast", 155)] {
            assert_eq!(slot_of(&ChannelName::parse(channel).unwrap()), slot, "{channel}");
        }
    }

    #[test]
    fn ranges_are_assigned() {
        let mut slots = SlotMap::all_at(0);
        slots.assign(12182, 12182, 3);
        assert_eq!(slots.primary_of(&ChannelName::parse("foo").unwrap()), 3);
        assert_eq!(slots.primary_of(&ChannelName::parse("room").unwrap()), 0);
        slots.assign(9, 8, 5); // nothing
        slots.assign(0, u16::MAX, 1);
        assert_eq!(slots, SlotMap::all_at(1));
    }
}
