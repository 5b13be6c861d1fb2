"""Reads the reports of the Autobahn suite (their index.json). Prints failed cases and exits with 1 if there are any."""
from __future__ import print_function

import collections
import json
import sys

# The number of cases in groups 1 to 10 of the suite: a part that did not run is a failure.
CASES = 301
GOOD = ("OK", "NON-STRICT", "INFORMATIONAL")

cases = {}
# A later run of a case replaces an earlier one.
for name in sorted(sys.argv[1:], key=lambda name: int(name.split("/")[-2])):
    with open(name) as report:
        cases.update(json.load(report)["fanfare"])

bad = sorted(
    "%s: %s, closing %s" % (case, result["behavior"], result["behaviorClose"])
    for case, result in cases.items()
    if result["behavior"] not in GOOD or result["behaviorClose"] not in GOOD
)
for line in bad:
    print(line)
print("Autobahn: %d cases," % len(cases), dict(collections.Counter(r["behavior"] for r in cases.values())))
if len(cases) != CASES:
    sys.exit("%d cases were run, not %d: see target/autobahn/run" % (len(cases), CASES))
if bad:
    sys.exit("%d cases failed: see target/autobahn/run" % len(bad))
