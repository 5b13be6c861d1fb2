//! The test binaries themselves.

use crate::common::sources::{has_test, orphans};

#[test]
fn every_test_file_is_part_of_a_binary() {
    assert_eq!(orphans(), Vec::<&str>::new());
    assert!(has_test("test_programs::every_test_file_is_part_of_a_binary"));
}
