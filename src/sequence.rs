//! The sequencer: lets each event of a channel through once, in id order, and says when one may be missing.
