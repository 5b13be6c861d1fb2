#!/usr/bin/env python3
"""A model of the bus over Redis under random faults. Python 3.11, standard library only.

  bussim.py proof [N [FIRST]]                  run N seeds each of all faults and of failovers alone; exit code 1 if the rules
                                               as built break the promise, or if the checker misses a known fault of an
                                               earlier rule
  bussim.py run  RULES [N [FIRST]] [CLASS,..]  run N seeds, count violations by kind, give the first seeds of each
  bussim.py show RULES SEED [CLASS,..] [KIND]  shrink that seed to the shortest failing scenario and print its trace
  bussim.py mutations [N]                      prove the checker: it must fail without each of the rules
  bussim.py ablate [N [CLASS,..]]              remove each rule of `final` to see which ones are needed

RULES: written | final | final-RULE (without one rule) | written+RULE | written,x=y. The rules are the fields of `Rules`.
CLASS: fault classes to draw from (default: all of SAFE). SAFE: drop conn lag node crash loss empty failover failback alone
  flush expire evict slow raw bogus follow. durable: --redis-durable. HARD, whose limits are known: split clock skew double
  forge.

Model: one channel, Redis servers 0 and 1 (snapshots per write, asynchronous replication), 2 to 4 nodes, 3 to 10 clients.
Time in seconds, ids in microseconds of the server's clock. After the heal time there are no faults, and few events.
`written` is the first draft of the protocol, `final` what src/bus/redis/lua/*.lua and src/bus/sequence/ do. CHOICE marks what
the draft left open. Kinds of violations that end in ~ are measured limits, not failures.
"""
import heapq, random, sys, time
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from types import SimpleNamespace as NS

RATE = 1_000_000            # ids per second of clock
GAP = 1 << 20
SAFE = 'drop conn lag node crash loss empty failover failback alone flush expire evict slow raw bogus follow'.split()
HARD = 'split clock skew double forge'.split()


class Rules:
    """The protocol. Class attributes: the first draft."""
    # -- as written; the `mutations` command turns these off one at a time
    continuity = True       # whether a position is continuous is never guessed
    new_epoch = True        # a script starts a new epoch when the stream is behind `seen`
    fill_gaps = True        # gaps are read from the stream
    verify = True           # False: trust Pub/Sub ids (any higher id moves the sequence)
    dedupe = True           # publish numbers
    filter_to = True        # private events only to their user
    sticky = True           # a reset mark also stops cursors that read from history
    probe = True            # the newest id comes back every second
    # -- choices that the draft leaves open
    window = True           # CHOICE the hash keeps the ids of the last numbers (False: only the last number and id)
    fresh_node = True       # CHOICE publish numbers start anew with every process
    ahead = 'skip'          # CHOICE client id > node's position: 'naive' false at the node's head; 'skip' ask the stream, skip live <= id; 'fill' catch up first
    ack_seen = True         # CHOICE ids that the node gets as replies count as seen
    # -- changes
    epoch = False           # a script compares the server's epoch with the channel's; if they differ, a new epoch starts
    base = False            # the first position of the epoch is stored; continuous needs N >= base; nodes compare bases
    always = False          # every script call keeps `seen` and may start an epoch (not just publish and reconnect)
    opens = False           # follow creates the sequence if there is none; the head is kept beside the stream
    inner = False           # sequenced events reach nodes on an inner Pub/Sub channel; an id on the public one means nothing
    token = 'ideal'         # what `epoch` compares. 'ideal': an oracle that changes with each start and promotion; 'run': run_id;
                            # 'run+replid2': as 0.1 was first; 'run+replid'; 'record': replid, and a record that keeps the epoch
    fresh = 2.0             # 'record': a new replid alone is no promotion if the record was written within so many seconds
    started = True          # 'record', durable: only a process that started after the record was written keeps the epoch
    copies = True           # 'record', durable: a new process keeps the epoch only if no replica was connected in it
    salt = True             # the gap ends in bits of the clock and the token
    gap = False             # a new base leaves GAP if the clock isn't ahead of what is known


class Written(Rules):
    pass


class Final(Rules):
    ahead = 'fill'
    token = 'record'
    epoch = base = always = opens = gap = inner = True


def rules(spec):
    spec = spec.replace(',', '+')
    parts = [p.replace('&', '+') for p in spec.replace('-', '+-').split('+')]   # & stands for a + in a value
    cls = {'written': Written, 'final': Final}[parts[0]]
    r = type('R', (cls,), {})()
    for p in parts[1:]:
        if not p:
            continue
        if '=' in p:
            k, v = p.split('=')
            setattr(r, k, float(v) if k == 'fresh' else v)
        else:
            k = p.lstrip('-')
            assert hasattr(r, k), k
            setattr(r, k, p[0] != '-')
    return r


class Ev:
    __slots__ = 'uid id to t acked lost doomed seen'.split()

    def __init__(s, uid, id, to, t, doomed):
        s.uid, s.id, s.to, s.t, s.doomed = uid, id, to, t, doomed
        s.acked, s.lost, s.seen = None, None, False


class Data:
    """One dataset: stream and hash. tl is a linked list of all events that its timeline accepted (for the checker)."""
    __slots__ = 'stream last head base epoch ideal record nums tl exp'.split()

    def __init__(s):
        s.stream, s.last, s.head, s.base, s.epoch, s.ideal, s.nums, s.tl, s.exp = [], 0, 0, 0, None, None, {}, None, None
        s.record = None                  # the server's record: epoch, run_id, replid, time, had a replica

    def copy(s):
        d = Data.__new__(Data)
        for k in Data.__slots__:
            setattr(d, k, getattr(s, k))
        return d


def walk(tl):
    while tl:
        yield tl[0]
        tl = tl[1]


class Server:
    def __init__(s, sim, n):
        s.sim, s.n, s.up, s.role = sim, n, True, 'primary' if n == 0 else 'replica'
        s.data, s.snaps, s.gen, s.off, s.subs, s.conns = Data(), [], 0, 0, {}, {}
        s.link, s.linkt = 0, 0           # replication link generation and its FIFO clock
        s.start_process(0)
        s.born = -10.0                   # uptime has whole seconds

    def start_process(s, kept):
        """Starts a process. `kept`: the replid in its snapshot, if it loads one."""
        s.epoch = s.runid = s.sim.newid()
        s.replid, s.replid2 = s.sim.newid(), kept
        s.backlog, s.alone, s.born = bool(kept), s.sim.now, s.sim.now
        s.watch()

    def watch(s):
        """A primary without a replica for repl-backlog-ttl frees its backlog and takes a new replid."""
        alone, run = s.alone, s.runid
        def free():
            if s.up and s.role == 'primary' and s.backlog and (s.alone, s.runid) == (alone, run) and s.sim.linked != (s.n, s.sim.servers[1 - s.n].gen):
                s.backlog, s.replid, s.replid2 = False, s.sim.newid(), 0
                s.sim.log('redis%d: frees its backlog' % s.n)
        s.sim.at(s.sim.now + s.sim.sc.backlog, free)

    def attach(s, peer):
        """`peer` is a replica of this primary from now on, in sync."""
        if not s.backlog:
            s.backlog, s.replid, s.replid2 = True, s.sim.newid(), 0
        peer.replid, peer.replid2, peer.backlog = s.replid, 0, True
        s.alone = -1

    def left(s):
        if s.alone < 0:
            s.alone = s.sim.now
            s.watch()

    def identity(s, P):
        """What a script compares with the channel's epoch, and whether a durable channel may keep its epoch."""
        if P.token == 'ideal':
            return s.epoch, True
        if P.token == 'run':
            return s.runid, True
        if P.token == 'run+replid2':
            return (s.runid, s.replid2), s.replid2 == 0
        if P.token == 'run+replid':
            return (s.runid, s.replid), s.replid2 == 0
        now, m = s.clock(), s.data.record
        copied = s.alone < 0                         # connected_slaves is above 0
        if m and m[2] == s.replid:
            epoch = m[0]
            copied |= m[4]
            if now - m[3] < RATE and now >= m[3] and copied == m[4]:
                return epoch, False
        elif m and m[1] == s.runid and s.replid2 == 0 and 0 <= now - m[3] <= P.fresh * RATE:
            epoch = m[0]
            copied |= m[4]
        elif (m and s.sim.sc.durable and m[1] != s.runid and s.replid2 == 0 and not (P.copies and m[4])
              and (not P.started or s.clock(s.born) // RATE >= m[3] // RATE)):
            epoch = m[0]
        else:
            epoch = s.replid
        s.write()
        s.data.record = (epoch, s.runid, s.replid, now, copied)
        s.reship()
        return epoch, False

    def clock(s, at=None):
        return int((1000 + (s.sim.now if at is None else at) + s.off) * RATE)

    def write(s):
        s.snaps.append(s.data)
        if len(s.snaps) > 40:
            del s.snaps[0]
        s.data = s.data.copy()           # snaps hold the state before the write
        sim, peer = s.sim, s.sim.servers[1 - s.n]
        if peer.role == 'replica' and peer.up and sim.linked == (s.n, peer.gen):
            s.linkt = max(s.linkt, sim.now + sim.replag())
            sim.at(s.linkt, s.ship, s.data, s.link)

    def ship(s, data, link):
        peer = s.sim.servers[1 - s.n]
        if link == s.link and peer.role == 'replica' and peer.up:
            peer.data = data.copy()

    # ---- the script -------------------------------------------------------------------------------------------
    def check_epoch(s, P, seen, publishing):
        """The start of every script. Returns True if it wrote."""
        d = s.data
        tok, keeps = s.identity(P)
        d = s.data
        if P.epoch or P.base or P.opens:
            known = max(d.last, d.head, seen)
            behind = P.new_epoch and (publishing or P.always or seen) and d.head < seen
            if P.epoch and d.base and d.epoch != tok and s.sim.sc.durable and keeps and not behind:
                s.write(); d = s.data
                d.epoch = tok                        # --redis-durable: a restart loses nothing
                s.reship()
            new = d.base == 0 or (P.epoch and d.epoch != tok) or behind
            if new and d.base and not behind and d.ideal == s.epoch:
                s.sim.needless += 1
            if not new or (d.base == 0 and not publishing and not P.opens and not seen):
                return False
            s.write(); d = s.data
            c = s.clock()
            if P.gap and c <= known:
                a = known + GAP + ((c + tok * 7919) % GAP if P.salt else 0)
            else:
                a = max(c, known + 1)
            d.base = d.head = a
            d.epoch, d.ideal = tok, s.epoch
            s.sim.log('redis%d: new base %s' % (s.n, s.sim.i(a)))
            return True
        # as written: the stream's last id is the head
        if d.last == 0:
            if publishing or seen:
                s.write(); d = s.data
                d.last = max(s.clock(), seen + 1) - (1 if publishing else 0)
                s.sim.log('redis%d: sequence starts at %s' % (s.n, s.sim.i(d.last + 1)))
                return True
        elif P.new_epoch and d.last < seen:
            s.write(); d = s.data
            d.last = max(s.clock(), seen)
            s.sim.log('redis%d: behind, new epoch after %s' % (s.n, s.sim.i(d.last)))
            return True
        return False

    def head(s, P):
        return s.data.head if P.opens or P.base or P.epoch else s.data.last

    def publish(s, P, seen, node, batch):
        """batch: [(num, uid, to)]. Returns ids."""
        sim, out, fresh = s.sim, [], []
        for num, uid, to in batch:
            got = None
            if node is not None and P.dedupe:
                h = s.data.nums.get(node)
                if h:
                    if P.window:
                        got = h.get(num)
                    elif num <= max(h):
                        got = h[max(h)]
            if got is None:
                if not fresh:
                    s.check_epoch(P, seen, True)
                fresh.append(uid)
                s.write()
                d = s.data
                id = (d.head if P.opens or P.base or P.epoch else d.last) + 1
                d.last = d.head = id
                ev = Ev(uid, id, to, sim.now, sim.split_at if sim.primary is not s else None)
                sim.accept(ev)
                d.stream = (d.stream + [ev])[-sim.sc.maxlen:]
                d.tl = (ev, d.tl)
                if node is not None:
                    h = dict(d.nums.get(node, {}))
                    h[num] = id
                    if len(h) > 64:
                        del h[min(h)]
                    d.nums = {**d.nums, node: h}
                # re-ship: the write is complete now
                s.reship()
                sim.log('redis%d: %s takes %s%s' % (s.n, sim.i(id), uid, ' to ' + to if to else ''))
                s.pub(('e', ev))
                got = id
            out.append(got)
        return out

    def reship(s):
        peer = s.sim.servers[1 - s.n]
        if peer.role == 'replica' and peer.up and s.sim.linked == (s.n, peer.gen):
            s.sim.at(s.linkt, s.ship, s.data, s.link)

    def pub(s, msg, only=None):
        for sub in list(s.subs):
            if only is None or sub is only:
                sub.send(msg)

    def read(s, P, after, upto=None, limit=None):
        st = s.data.stream
        ids = [e.id for e in st]
        lo = bisect_right(ids, after)
        hi = len(st) if upto is None else bisect_right(ids, upto)
        ents = st[lo:hi]
        more = limit is not None and len(ents) > limit
        return NS(head=s.head(P), base=s.data.base, oldest=st[0].id if st else None, ents=ents[:limit] if more else ents,
                  more=more, holds=lo > 0 and ids[lo - 1] == after)

    # ---- faults ----------------------------------------------------------------------------------------------
    def drop_all(s):
        s.gen += 1
        for c in list(s.conns) + list(s.subs):
            if s.sim.rng.random() < .5:
                c.close(0)
            else:                                    # what is in flight still arrives
                s.sim.at(max(s.sim.now + s.sim.lat(), c.tr if isinstance(c, Conn) else c.t) + 1e-6, c.close, 0)
        s.subs.clear(); s.conns.clear()

    def crash(s):
        s.up = False
        s.link += 1
        s.drop_all()
        s.sim.servers[1 - s.n].left()

    def restart(s, mode, k):
        old = s.data
        if mode == 'loss' and s.snaps:
            k = min(k, len(s.snaps))
            s.data = s.snaps[-k].copy()
        elif mode == 'empty':
            s.data = Data()
        s.snaps = []
        s.sim.mark_lost(old.tl, s.data.tl)
        s.up = True
        s.start_process(s.replid if s.sim.rng.random() < .3 else 0)
        s.sim.log('redis%d: restarts (%s)' % (s.n, mode))

    def become(s, role):
        s.role = role
        if role == 'primary':
            s.epoch = s.sim.newid()
            s.replid, s.replid2, s.backlog = s.sim.newid(), s.replid, True
            s.alone = s.sim.now
            s.watch()
            s.link += 1
            s.linkt = s.sim.now


class Conn:
    """A node's (or external publisher's) command connection: FIFO both ways."""

    def __init__(s, sim, server, owner):
        s.sim, s.server, s.owner, s.open, s.gen = sim, server, owner, True, server.gen
        s.ta = s.tr = sim.now
        s.until = 1e9
        s.out = {}
        s.k = 0
        server.conns[s] = 1

    def request(s, fn, cb):
        """fn(server) runs there, cb(result) here."""
        sim = s.sim
        s.ta = max(s.ta, sim.now + sim.lat())
        s.k += 1
        s.out[s.k] = sim.now
        sim.at(s.ta, s.arrive, fn, cb, s.k)

    def arrive(s, fn, cb, k):
        sv = s.server
        if not sv.up or sv.gen != s.gen or s.sim.now > s.until:
            return
        if sv.role != 'primary':
            if s.open:
                s.owner.conn_lost(s, 'READONLY')
            return
        r = fn(sv)
        s.tr = max(s.tr, s.sim.now + s.sim.lat())
        s.sim.at(s.tr, s.reply, cb, r, k)

    def reply(s, cb, r, k):
        if s.open:
            s.out.pop(k, None)
            cb(r)

    def close(s, late):
        """late: how long calls in flight may still be executed."""
        if s.open:
            s.open = False
            s.until = s.sim.now + late
            s.server.conns.pop(s, None)
            s.sim.at(s.sim.now + s.sim.lat(), s.owner.conn_lost, s, 'closed')


class Sub:
    n = 0

    def __init__(s, sim, server, node):
        Sub.n += 1
        s.n = Sub.n
        s.sim, s.server, s.node, s.open, s.gen, s.t = sim, server, node, True, server.gen, sim.now
        s.chan, s.mute, s.born = False, False, sim.now
        s.deaf = False
        server.subs[s] = 1

    def send(s, msg):
        sim = s.sim
        if s.mute or (msg[0] != 'c' and (not s.chan or s.deaf)):
            return
        if sim.pdrop and sim.rng.random() < sim.pdrop:
            if msg[0] == 'e':
                sim.log('  pub/sub %s lost for node%d' % (sim.i(msg[1].id), s.node.n))
            return
        s.t = max(s.t, sim.now + sim.lat() + s.node.lag)
        sim.at(s.t, s.deliver, msg)

    def deliver(s, msg):
        if s.open and s.node.sub is s:
            s.node.on_msg(msg)

    def close(s, late=0):
        if s.open:
            s.open = False
            s.server.subs.pop(s, None)
            s.sim.at(s.sim.now + s.sim.lat(), s.node.conn_lost, s, 'closed')


class Sock:
    """A client's connection on the node."""

    def __init__(s, sim, client, node, last):
        s.sim, s.client, s.node, s.last = sim, client, node, last
        s.open, s.mode, s.pos, s.cur, s.hbuf, s.asking, s.skip = True, 'join', None, 0, [], False, 0
        s.credit = 2 if client.slow and not sim.healed else 10**9
        s.t = sim.now
        s.asked = False

    def send(s, frame):
        s.t = max(s.t, s.sim.now + s.sim.lat())
        s.sim.at(s.t, s.client.receive, s, frame)


class Node:
    def __init__(s, sim, n):
        s.sim, s.n, s.P = sim, n, sim.P
        s.lag, s.up = 0, True
        s.phase = sim.rng.random()
        s.start()
        sim.at(s.phase, s.tick)

    def start(s):
        s.id = s.sim.newid() if s.P.fresh_node else 'node%d' % s.n
        s.up = True
        s.num, s.pend, s.unsent = 0, {}, []
        s.cmd = s.sub = None
        s.seen = 0
        s.socks = []
        s.life = s.sim.newid()
        s.forget()
        s.connecting = set()
        s.last_probe = s.sim.now
        s.connect('cmd'); s.connect('sub')

    def forget(s):
        s.following, s.opened, s.gen = False, False, s.sim.newid()
        s.pos = s.base = s.seg = s.off = 0
        s.feed = []
        s.filling, s.refill, s.hint = False, False, 0

    def stop(s):
        s.up = False
        s.life = 0
        for c in (s.cmd, s.sub):
            if c:
                c.close(s.sim.rng.random() * .3)
        s.cmd = s.sub = None
        for k in s.socks:
            k.open = False
            s.sim.at(s.sim.now + s.sim.lat(), k.client.cut, k)
        s.socks = []

    # ---- connections to Redis
    def connect(s, what):
        if what not in s.connecting and getattr(s, what) is None and s.up:
            s.connecting.add(what)
            s.sim.at(s.sim.now + .02 + s.sim.rng.random() * .3, s.try_connect, what, s.life)

    def try_connect(s, what, life):
        if life != s.life:
            return
        s.connecting.discard(what)
        sv = s.sim.target(s.n)
        if sv is None or not sv.up:
            return s.connect(what)
        if what == 'cmd':
            s.cmd = Conn(s.sim, sv, s)
            if s.following:
                s.call('open')
            if s.pend:
                s.send_batch(sorted(s.pend))
                s.unsent = []
        else:
            s.sub = Sub(s.sim, sv, s)
            s.last_probe = s.sim.now
            if s.following:
                s.subscribe()

    def conn_lost(s, c, why):
        if c is s.cmd:
            if c.open:
                c.open = False
                c.server.conns.pop(c, None)
            s.cmd = None
            s.filling = False
            for k in s.socks:
                k.asking = False
            s.connect('cmd')
        elif c is s.sub:
            s.sub = None
            s.connect('sub')

    def subscribe(s):
        sub, gen = s.sub, s.gen
        def done():
            if sub.open and s.gen == gen:
                sub.chan = True
                s.sim.at(s.sim.now + s.sim.lat(), lambda: s.gen == gen and s.opened and s.want_fill())
        s.sim.at(s.sim.now + s.sim.lat(), done)

    def call(s, what, cb=None, **kw):
        """One script call. Carries `seen` where the rules say so."""
        if not s.cmd:
            return False
        P, seen, gen = s.P, s.seen if s.following or s.sim.sc.keep_seen else 0, s.gen
        if what == 'open':
            def fn(sv):
                sv.check_epoch(P, seen if P.new_epoch else 0, False) if P.new_epoch or P.opens else None
                return sv.read(P, 10**18)
            cb = cb or s.on_open
        elif what == 'read':
            def fn(sv):
                if P.always:
                    sv.check_epoch(P, seen, False)
                return sv.read(P, **kw)
        elif what == 'probe':
            sub, chan = s.sub, s.following
            def fn(sv):
                if P.always and chan:
                    sv.check_epoch(P, seen, False)
                elif P.token == 'record':
                    sv.identity(P)
                if sub:
                    sv.pub(('c', sv.head(P), sv.data.base, gen), only=sub)
                return None
            cb = lambda r: None
        if what == 'probe':
            s.cmd.request(fn, cb)
        else:
            s.cmd.request(fn, lambda r: cb(r) if gen == s.gen else None)
        return True

    def tick(s):
        sim = s.sim
        if sim.now < sim.end:
            sim.at(sim.now + 1, s.tick)
        if not s.up:
            return
        for k in [k for k, v in s.pend.items() if v[2] < sim.now - 4]:
            sim.rejected.add(s.pend.pop(k)[0])        # timed out: error frame
        if s.cmd and s.cmd.out and min(s.cmd.out.values()) < sim.now - 1.2:
            c = s.cmd
            c.close(sim.rng.random() * .3)
        elif s.cmd and s.P.probe:
            s.call('probe')
        if s.P.probe and s.sub and sim.now - s.last_probe > 2.2:
            s.sub.close()
            if s.cmd:
                s.cmd.close(sim.rng.random() * .2)
        for k in list(s.socks):
            if k.client.slow and not sim.healed:
                k.credit = min(k.credit + 2, 3)
            s.flush(k)

    # ---- publishing
    def publish(s, uid, to):
        if not s.up:
            return
        s.num += 1
        s.pend[s.num] = (uid, to, s.sim.now)
        s.unsent.append(s.num)
        s.sim.log('node%d: publish #%d %s' % (s.n, s.num, uid))
        if len(s.unsent) == 1:
            s.sim.at(s.sim.now + s.sim.rng.choice([0, .001, .004]), s.gather, s.life)

    def gather(s, life):
        if life == s.life and s.cmd and s.unsent:
            nums, s.unsent = [n for n in s.unsent if n in s.pend], []
            s.send_batch(nums)

    def send_batch(s, nums):
        step = s.sim.rng.choice([1, 1, 3, 9])
        for i in range(0, len(nums), step):
            part = [n for n in nums[i:i + step]]
            batch = [(n, s.pend[n][0], s.pend[n][1]) for n in part]
            seen = s.seen
            s.cmd.request(lambda sv, b=batch, id=s.id, seen=seen: sv.publish(s.P, seen, id, b), lambda ids, part=part: s.on_acks(part, ids))

    def on_acks(s, nums, ids):
        for n, id in zip(nums, ids):
            v = s.pend.pop(n, None)
            if v:
                s.sim.ack(v[0], id)
            if s.P.ack_seen and (s.following or s.sim.sc.keep_seen):
                s.seen = max(s.seen, id)

    # ---- following and the sequence
    def follow(s):
        s.forget()
        s.following = True
        if not s.sim.sc.keep_seen:
            s.seen = 0
        if s.sub:
            s.subscribe()
        s.call('open')

    def unfollow(s):
        if s.following and not s.socks:
            s.sim.log('node%d: unfollows' % s.n)
            if s.sub:
                s.sub.chan = False
            s.forget()

    def on_open(s, r):
        if not s.following:
            return
        if s.opened:                                 # reconnected
            return s.want_fill()
        s.opened = True
        s.pos = s.seg = r.head
        s.base = r.base
        s.seen = max(s.seen, r.head)
        s.sim.log('node%d: follows from %s' % (s.n, s.sim.i(s.pos)))
        for k in list(s.socks):
            if k.mode == 'join':
                s.resolve(k)

    def on_msg(s, m):
        if m[0] == 'c':
            s.last_probe = s.sim.now
            if s.opened and m[3] == s.gen and (m[1] > s.pos or (s.P.base and m[2] > s.base)):
                s.want_fill()
            return
        if not s.opened:
            return
        ev = m[1]
        if ev.lost == -1 and s.P.inner:
            return
        if ev.id == s.pos + 1 or (not s.P.verify and ev.id > s.pos):
            s.emit(ev)
        elif ev.id > s.pos:
            s.want_fill()

    def want_fill(s):
        if not s.P.fill_gaps:
            return
        if s.filling:
            s.refill = True
        elif s.cmd and s.opened:
            s.filling = True
            s.call('read', s.on_fill, after=s.pos)

    def on_fill(s, r):
        s.filling = False
        s.on_read(r)
        for k in list(s.socks):
            if k.mode == 'join':
                s.resolve(k)
        if s.refill:
            s.refill = False
            s.want_fill()

    def on_read(s, r):
        """The reply of a stream read: entries after some position <= pos."""
        P = s.P
        ents = [e for e in r.ents if e.id > s.pos]
        if P.base:
            if r.base < s.base:
                return                               # stale reply: read before the base that is known
            if r.base > s.base:
                s.base = r.base
                return s.reset(r.head)
            if r.head <= s.pos:
                return
            if ents and ents[0].id == s.pos + 1:
                for e in ents:
                    s.emit(e)
            else:
                s.reset(r.head)                      # trimmed or expired
            return
        if not P.continuity:
            for e in ents:
                s.emit(e)
            s.pos = max(s.pos, r.head)
            return
        if ents:
            i = 0
            while i < len(ents) and ents[i].id == s.pos + 1:
                s.emit(ents[i]); i += 1
            if i < len(ents):
                s.reset(r.head)
        if r.head > s.pos and r.ents is not None:
            # as written: the newest id is higher, and no entries lead to it (new epoch without an event, trimmed, expired)
            s.reset(r.head)

    def emit(s, ev):
        s.pos = ev.id
        s.seen = max(s.seen, ev.id)
        s.append(ev)

    def reset(s, n):
        s.sim.log('node%d: reset at %s (was %s)' % (s.n, s.sim.i(n), s.sim.i(s.pos)))
        s.pos = s.seg = n
        s.seen = max(s.seen, n)
        s.append(None)
        for k in list(s.socks):
            if k.mode == 'hist' and s.P.sticky:
                s.cut_reset(k)

    def append(s, ev):
        s.feed.append((ev, s.pos))
        for k in list(s.socks):
            if k.mode != 'join':
                s.flush(k)
        while len(s.feed) > s.sim.sc.feed:
            ev, p = s.feed[0]
            for k in list(s.socks):
                if k.mode == 'feed' and k.cur == s.off:
                    if ev is not None and ev.to and ev.to != k.client.user and s.P.filter_to:
                        k.cur += 1; k.pos = p        # skipped
                    elif any(e is None for e, _ in s.feed) and s.P.sticky:
                        s.cut_reset(k)
                    else:
                        k.mode, k.hbuf = 'hist', []
            del s.feed[0]
            s.off += 1
            s.seg = max(s.seg, p)

    def cut_reset(s, k):
        """Sends a reset now and moves the cursor to the end."""
        if k.client.plain:
            s.close(k, 4008)
        else:
            k.send(('r', s.pos, s.sim.now))
            k.mode, k.cur, k.pos, k.hbuf = 'feed', s.off + len(s.feed), s.pos, []

    def close(s, k, code):
        if k.open:
            k.open = False
            s.socks.remove(k)
            k.send(('close', code, s.sim.now))
            s.sim.at(s.sim.now + .3, s.unfollow)

    # ---- client connections
    def accept(s, k):
        if not s.up or not k.client.sock is k:
            return s.sim.at(s.sim.now + .01, k.client.cut, k)
        s.socks.append(k)
        if not s.following:
            s.follow()
        elif s.opened:
            s.resolve(k)

    def drop(s, k):
        if k in s.socks:
            k.open = False
            s.socks.remove(k)
            s.sim.at(s.sim.now + .3, s.unfollow)

    def welcome(s, k, n, h, ok):
        k.send(('w', n, h, ok, s.sim.now))
        k.pos = n

    def at_end(s, k):
        k.mode, k.cur = 'feed', s.off + len(s.feed)

    def seek(s, k):
        """Into the feed behind k.pos (k.pos >= seg)."""
        i = len(s.feed)
        while i > 0 and s.feed[i - 1][0] is not None and s.feed[i - 1][1] > k.pos:
            i -= 1
        k.mode, k.cur = 'feed', s.off + i

    def resolve(s, k):
        n = k.last
        if not k.open or not s.opened:
            return
        if n is None:                                 # plain
            k.pos = s.pos
            k.send(('s', s.pos, s.sim.now))           # for the checker alone
            return s.at_end(k)
        if n == '':
            s.welcome(k, s.pos, s.pos, True)
            return s.at_end(k)
        if s.seg <= n <= s.pos and n > 0:             # CHOICE 0, the head of an empty channel, is not continuous
            s.welcome(k, n, s.pos, True)
            s.seek(k)
            return s.flush(k)
        if not s.P.continuity and n > 0:
            s.welcome(k, n, max(n, s.pos), True)
            k.mode = 'hist'
            return s.flush(k)
        if n > s.pos:
            if s.P.ahead == 'naive' or (s.P.ahead == 'fill' and k.asked):
                s.welcome(k, s.pos, s.pos, False)
                return s.at_end(k)
            if s.P.ahead == 'fill':
                def caught_up(r):
                    k.asking, k.asked = False, True
                    s.on_read(r)
                    if k.mode == 'join':
                        s.resolve(k)
                if s.cmd and not k.asking:
                    k.asking = True
                    s.call('read', caught_up, after=s.pos)
                return
        if not k.asking and s.cmd:
            k.asking = True
            k.upto = s.seg
            s.call('read', lambda r: s.on_join(k, r), after=n, upto=max(n, s.seg), limit=s.sim.sc.page)

    def is_continuous(s, n, r):
        if s.P.base:
            return r.base == s.base and r.base <= n <= r.head and (n == r.head or (r.oldest is not None and r.oldest <= n + 1))
        return r.holds or (r.oldest is not None and r.oldest == n + 1) or (n == r.head and n > 0)

    def on_join(s, k, r):
        k.asking = False
        if not k.open or k.mode != 'join':
            return
        n = k.last
        if s.seg <= n <= s.pos and n > 0:
            return s.resolve(k)
        if s.P.base and r.base > s.base:
            s.on_read(r)
        if s.is_continuous(n, r):
            s.welcome(k, n, max(s.pos, n), True)
            if n > s.pos:
                k.skip = n
                return s.at_end(k)
            k.mode = 'hist'
            return s.page(k, r)
        s.welcome(k, s.pos, s.pos, False)
        s.at_end(k)

    def page(s, k, r):
        k.hbuf = [e for e in r.ents if e.id <= k.upto]
        k.hend = k.hbuf[-1].id if r.more and k.hbuf else k.upto
        if not k.hbuf:
            k.pos = max(k.pos, k.hend)
        s.flush(k)

    def on_page(s, k, r, n):
        k.asking = False
        if not k.open or k.mode != 'hist':
            return
        if k.pos >= s.seg or k.pos != n:             # the reply is for the position that was asked for
            return s.flush(k)
        if s.P.base and r.base > s.base:
            s.on_read(r)
            if k.mode != 'hist':
                return
        if s.P.continuity and not s.is_continuous(k.pos, r):
            return s.cut_reset(k)
        s.page(k, r)

    def flush(s, k):
        if not k.open or k.mode == 'join':
            return
        for_k = lambda e: not e.to or e.to == k.client.user or not s.P.filter_to
        while k.open:
            if k.mode == 'hist':
                if k.hbuf:
                    e = k.hbuf[0]
                    if for_k(e):
                        if k.credit <= 0:
                            return
                        k.credit -= 1
                        k.send(('e', e, s.sim.now))
                    k.pos = e.id
                    del k.hbuf[0]
                    if not k.hbuf:
                        k.pos = max(k.pos, k.hend)
                elif k.pos >= s.seg:
                    s.seek(k)
                else:
                    if not k.asking and s.cmd and k.credit > 0:
                        k.asking, k.upto = True, s.seg
                        s.call('read', lambda r, n=k.pos: s.on_page(k, r, n), after=k.pos, upto=s.seg, limit=s.sim.sc.page)
                    return
                continue
            i = k.cur - s.off
            if i >= len(s.feed):
                return
            ev, p = s.feed[i]
            if ev is None:
                if k.client.plain:
                    return s.close(k, 4008)
                k.send(('r', p, s.sim.now))
            elif p <= k.skip:
                pass
            elif for_k(ev):
                if k.credit <= 0:
                    return
                k.credit -= 1
                k.send(('e', ev, s.sim.now))
            k.pos = p
            k.cur += 1


class Client:
    def __init__(s, sim, n, spec):
        s.sim, s.n, s.user, s.plain, s.slow = sim, n, spec.user, spec.plain, spec.slow
        s.sock, s.pos, s.log, s.welcomed, s.since = None, '', [], False, 0
        sim.at(spec.t, s.connect, spec.node)

    def connect(s, node, last=None):
        sim = s.sim
        if s.sock:
            return
        up = [n for n in sim.nodes if n.up]
        if not up:
            return sim.at(sim.now + .2, s.connect, node)
        n = sim.nodes[node % len(sim.nodes)]
        if not n.up:
            n = up[node % len(up)]
        if last is not None:
            s.pos = last
        k = s.sock = Sock(sim, s, n, None if s.plain else s.pos)
        s.welcomed, s.since = False, sim.now
        s.log.append(('c', None if s.plain else s.pos, sim.now))
        sim.log('client%d: connects to node%d with %s' % (s.n, n.n, 'nothing' if s.plain else sim.i(s.pos)))
        sim.at(sim.now + sim.lat(), n.accept, k)

    def receive(s, k, f):
        if s.sock is not k:
            return
        if f[0] == 'close':
            s.log.append(('close', f[1], s.sim.now))
            s.sim.log('client%d: closed %d' % (s.n, f[1]))
            return s.cut(k)
        s.log.append(f + (s.sim.now,))
        if f[0] == 'e':
            s.pos = f[1].id
            if f[1].id > 0:
                f[1].seen = True
            s.sim.log('client%d: got %s %s' % (s.n, s.sim.i(f[1].id), f[1].uid))
        elif f[0] in 'rw':
            s.pos = f[1]
            s.welcomed = True
            s.sim.log('client%d: %s' % (s.n, 'reset at %s' % s.sim.i(f[1]) if f[0] == 'r' else 'welcome %s head %s recovered:%s' % (s.sim.i(f[1]), s.sim.i(f[2]), f[3])))
        else:
            s.welcomed = True

    def cut(s, k, delay=None, node=None, last=None):
        """The connection is lost; the client reconnects later."""
        if s.sock is not k or k is None:
            return
        s.sock = None
        s.sim.at(s.sim.now + s.sim.lat(), k.node.drop, k)
        s.sim.at(s.sim.now + (.1 + s.sim.rng.random() * .4 if delay is None or s.sim.healed else delay), s.connect,
                 s.sim.rng.randrange(99) if node is None else node, last)


class Sim:
    def __init__(s, sc, P, trace=False):
        s.sc, s.P, s.trace = sc, P, [] if trace else None
        s.rng = random.Random(sc.lseed * 7 + 1)
        s.q, s.n, s.now, s.ids = [], 0, 0.0, 0
        s.pdrop = s.needless = 0
        s.rlag = sc.rlag
        s.linked = (0, 0)
        s.healed, s.split_at = False, 0
        s.end = 1e9
        s.events, s.byuid, s.acks, s.raws, s.rejected, s.evicted = [], defaultdict(list), [], [], set(), False
        s.servers = [Server(s, 0), Server(s, 1)]
        s.servers[1].off = sc.skew
        s.primary, s.oldside, s.linked = s.servers[0], None, (0, 0)
        s.servers[0].attach(s.servers[1])
        s.names = {}
        Sub.n = 0
        s.nodes = [Node(s, i) for i in range(sc.nodes)]
        s.clients = [Client(s, i, c) for i, c in enumerate(sc.clients)]
        s.uids = 0
        for a in sc.actions:
            s.at(a[0], s.act, a)
        s.at(sc.heal, s.heal)

    # ---- machinery
    def newid(s):
        s.ids += 1
        return s.ids

    def at(s, t, fn, *a):
        s.n += 1
        heapq.heappush(s.q, (t, s.n, fn, a))

    def lat(s):
        x = s.rng.random()
        if x < .03 and not s.healed:
            return .05 + s.rng.random() * .3
        return .0003 + x * .003

    def replag(s):
        return s.rlag * (.3 + s.rng.random()) if not s.healed else .002

    def i(s, id):
        """A readable id for the trace."""
        if not isinstance(id, int) or s.trace is None:
            return repr(id)
        d = id - 1000 * RATE
        return str(id) if d < 0 else '%.6f' % (d / RATE)

    def log(s, txt):
        if s.trace is not None:
            s.trace.append('%8.3f %s' % (s.now, txt))

    def run(s):
        while s.q:
            t, _, fn, a = heapq.heappop(s.q)
            if t > s.end:
                break
            s.now = t
            fn(*a)
        return s

    def target(s, n):
        if s.oldside and n in s.oldside[1]:
            return s.oldside[0]
        return s.primary

    def accept(s, ev):
        s.events.append(ev)
        s.byuid[ev.uid].append(ev)

    def ack(s, uid, id):
        s.acks.append((uid, id))
        s.log('publisher of %s: ack %s' % (uid, s.i(id)))
        for ev in s.byuid.get(uid, ()):
            if ev.id == id and ev.acked is None:
                ev.acked = s.now

    def mark_lost(s, old, new):
        keep = set(map(id, walk(new)))
        for ev in walk(old):
            if id(ev) not in keep and ev.lost is None:
                ev.lost = s.now
                s.log('  lost: %s %s%s' % (s.i(ev.id), ev.uid, ' (acknowledged)' if ev.acked is not None else ''))

    # ---- actions
    def act(s, a):
        getattr(s, 'do_' + a[1])(*a[2:])

    def uid(s):
        s.uids += 1
        return 'm%d' % s.uids

    def do_pub(s, src, n, to):
        uid = s.uid()
        if src == 'c':
            c = s.clients[n % len(s.clients)]
            if c.sock and c.welcomed and c.sock.open:
                s.at(s.now + s.lat(), lambda nd=c.sock.node: nd.publish(uid, to))
        elif src == 'n':
            s.nodes[n % len(s.nodes)].publish(uid, to)
        else:
            sv = s.primary
            if s.oldside and n % 2:
                sv = s.oldside[0]
            if sv is None:
                return
            gen = sv.gen
            def arrive():
                if sv.up and sv.gen == gen and sv.role == 'primary':
                    id = sv.publish(s.P, 0, None, [(0, uid, to)])[0]
                    if s.rng.random() > .05:
                        s.at(s.now + s.lat(), s.ack, uid, id)
            s.at(s.now + s.lat(), arrive)

    def do_raw(s, kind, d):
        sv = s.primary
        if sv and sv.up and sv.head(s.P):
            h = sv.head(s.P)
            id = {'far': h + 1000 + d, 'near': h + 2 + d, 'old': max(1, h - d), 'next': h + 1}[kind]
            ev = Ev('raw%d' % s.newid(), id, None, s.now, False)
            ev.lost = -1
            s.raws.append(ev)
            s.log('raw PUBLISH with id %s' % s.i(id))
            sv.pub(('e', ev))

    def do_cdrop(s, n, delay, node, last):
        c = s.clients[n % len(s.clients)]
        if c.sock:
            s.log('client%d: disconnects' % c.n)
            if last == 'fresh':
                l = ''
            elif isinstance(last, tuple):             # bogus id near the head
                sv = s.primary or s.servers[0]
                l = max(1, sv.head(s.P) + last[1]) if last[0] == 'h' else last[1]
            else:
                l = None
            c.cut(c.sock, delay, node, l)

    def do_drop(s, p, dur):
        s.pdrop = p
        s.log('pub/sub loses %d%%' % (p * 100))
        s.at(s.now + dur, s.set, 'pdrop', 0)

    def set(s, k, v):
        setattr(s, k, v)

    def do_subdrop(s, n, how):
        nd = s.nodes[n % len(s.nodes)]
        if nd.sub:
            s.log('node%d: subscriber connection %s' % (nd.n, how))
            if how == 'cut':
                nd.sub.close()
            elif how == 'mute':
                nd.sub.mute = True
            else:
                nd.sub.deaf = True

    def do_cmddrop(s, n, late):
        nd = s.nodes[n % len(s.nodes)]
        if nd.cmd:
            s.log('node%d: command connection cut' % nd.n)
            nd.cmd.close(late)

    def do_lag(s, n, lag, dur):
        nd = s.nodes[n % len(s.nodes)]
        nd.lag = lag
        s.log('node%d: receives %.1fs late' % (nd.n, lag))
        s.at(s.now + dur, lambda: setattr(nd, 'lag', 0))

    def do_node(s, n, down):
        nd = s.nodes[n % len(s.nodes)]
        if nd.up:
            s.log('node%d: dies' % nd.n)
            nd.stop()
            s.at(s.now + down, lambda: nd.up or nd.start())

    def do_crash(s, mode, k, down):
        sv = s.primary
        if sv and sv.up and not s.oldside:
            s.log('redis%d: crashes' % sv.n)
            sv.crash()
            gen = sv.gen
            def back():
                if not sv.up and sv.gen == gen:
                    sv.restart(mode, k)
                    s.relink(sv)
            s.at(s.now + down, back)

    def relink(s, sv, wait=None):
        """sv is the primary; its peer syncs from it after a while."""
        peer = s.servers[1 - sv.n]
        def sync():
            if peer.up and peer.role == 'replica' and sv.up and sv.role == 'primary':
                peer.data = sv.data.copy()
                peer.snaps = []
                sv.link += 1
                sv.linkt = s.now
                s.linked = (sv.n, peer.gen)
                sv.attach(peer)
        s.linked = None
        sv.left()
        s.at(s.now + (s.rng.random() * 1.5 if wait is None else wait), sync)

    def do_failover(s, split, detect, back):
        old = s.primary
        if old is None or s.oldside or not old.up:
            return
        new = s.servers[1 - old.n]
        if not new.up or new.role != 'replica':
            return
        if s.linked != (old.n, new.gen) and not s.sc.double:
            return                                     # a replica that never synced is not promoted (CHOICE), but in `double`
        olddata = old.data
        if split:
            side = [n.n for n in s.nodes if s.rng.random() < .5]
            s.log('failover to redis%d; redis%d stays primary for nodes %s' % (new.n, old.n, side))
            old.link += 1
            s.linked = None
            new.become('primary')
            s.primary = new
            s.oldside, s.split_at = (old, side), s.now
            s.mark_lost(olddata.tl, new.data.tl)
            for nd in s.nodes:
                if nd.n not in side:
                    # command and subscriber connections may move at different times
                    for c in (nd.cmd, nd.sub):
                        if c:
                            s.at(s.now + s.rng.random() * .8, c.close, 0)
            s.at(s.now + split, s.end_split)
        else:
            s.log('redis%d: dies, failover follows' % old.n)
            old.crash()
            s.primary = None
            s.linked = None
            def promote():
                if s.primary is None:
                    new.become('primary')
                    s.primary = new
                    old.role = 'replica'
                    s.mark_lost(old.data.tl, new.data.tl)
                    s.log('redis%d: promoted' % new.n)
                    def rejoin():
                        if not old.up:
                            old.up = True
                            old.start_process(0)
                            s.relink(new)
                    s.at(s.now + back, rejoin)
            s.promote = promote
            s.at(s.now + detect, promote)

    def do_failback(s, away, stay, mean):
        """The replica is promoted without all writes; the old primary becomes its replica, and is promoted again.
        `away`: all nodes are down meanwhile and for a while after."""
        old = s.primary
        if old is None or s.oldside or not old.up:
            return
        new = s.servers[1 - old.n]
        if not new.up or new.role != 'replica' or s.linked != (old.n, new.gen):
            return
        if away:
            for nd in s.nodes:
                if nd.up:
                    nd.stop()
                    s.at(s.now + stay + away, lambda nd=nd: nd.up or nd.start())
        s.swap(old, new)
        s.relink(new, .1)
        def back():
            if s.primary is new and new.up and old.up and old.role == 'replica' and s.linked == (new.n, old.gen):
                s.swap(new, old)
                if not mean:                         # the other one stays away: the backlog is freed
                    s.relink(old, .1)
                else:
                    s.linked = None
        s.at(s.now + stay, back)

    def swap(s, old, new):
        s.log('redis%d is demoted, redis%d promoted' % (old.n, new.n))
        old.link += 1
        old.role = 'replica'
        old.drop_all()
        new.become('primary')
        s.primary, s.linked = new, None
        s.mark_lost(old.data.tl, new.data.tl)

    def do_alone(s, dur):
        """The replica disconnects for a while."""
        sv = s.primary
        if sv and sv.up and not s.oldside and s.linked == (sv.n, s.servers[1 - sv.n].gen):
            s.log('redis%d: its replica disconnects' % sv.n)
            s.relink(sv, dur)

    def end_split(s):
        if s.oldside:
            old = s.oldside[0]
            s.oldside = None
            s.log('redis%d: demoted' % old.n)
            s.mark_lost(old.data.tl, s.primary.data.tl)
            old.role = 'replica'
            old.drop_all()
            s.relink(s.primary)

    def do_flush(s):
        sv = s.primary
        if sv and sv.up:
            s.log('FLUSHALL')
            old = sv.data.tl
            sv.write()
            sv.data = Data()
            sv.reship()
            s.mark_lost(old, None)

    def do_expire(s, both):
        sv = s.primary
        if sv and sv.up and sv.data.last and (not s.events or s.events[-1].t < s.now - 3) and not s.oldside:   # idle
            s.log('history expires%s' % (' with the hash' if both else ''))
            old = sv.data
            sv.write()
            sv.data = Data()
            if not both and (s.P.opens or s.P.base):
                # the hash stays while nodes follow
                sv.data.head, sv.data.base, sv.data.epoch, sv.data.nums = old.head, old.base, old.epoch, old.nums
                sv.data.tl = old.tl
            else:
                s.mark_lost(old.tl, None)
            sv.reship()

    def do_evict(s, what):
        sv = s.primary
        if sv and sv.up and sv.data.last:
            s.log('evicted: ' + what)
            s.evicted = True
            sv.write()
            d = sv.data
            if what == 'hash':
                d.nums, d.head, d.base, d.epoch = {}, (0 if s.P.base or s.P.opens else d.head), 0, None
            else:
                d.stream, d.last = [], 0
                if not (s.P.opens or s.P.base or s.P.epoch):
                    s.mark_lost(d.tl, None)          # as written, this loses everything
                    d.tl = None
            sv.reship()

    def do_clock(s, n, d):
        s.log('clock of redis%d moves by %.3f' % (n, d))
        s.servers[n].off += d

    def do_rlag(s, x, dur):
        s.rlag = x
        s.at(s.now + dur, s.set, 'rlag', s.sc.rlag)

    def heal(s):
        s.log('--- faults end')
        s.pdrop = 0
        s.end_split()
        if s.primary is None:
            s.promote()
        for sv in s.servers:
            if not sv.up:
                if sv is s.primary:
                    sv.restart('aof', 0)
                    s.relink(sv)
                else:
                    sv.up = True
        s.healed = True
        for n in s.nodes:
            n.lag = 0
            if not n.up:
                n.start()
        for c in s.clients:
            c.slow = False
            if c.sock:
                c.sock.credit = 10**9
            else:
                s.at(s.now + .05, c.connect, s.rng.randrange(99))
        s.end = s.now + 6.5


# ---------------------------------------------------------------------------------------------------------------- checker
def check(sim):
    """Returns [(kind, text)]. Kinds ending in ~ are measured, not violations of the promise within one continuous run."""
    bad, P = [], sim.P
    def v(kind, fmt, *a):
        bad.append((kind, fmt % a if sim.trace is not None else fmt))
    evs = sorted(sim.events, key=lambda e: (e.id, e.t))
    ids = [e.id for e in evs]
    i = sim.i
    need = lambda e, c: (e.acked is not None or e.lost is None) and (not e.to or e.to == c.user)
    if sim.needless:
        v('needless reset~', '%d', sim.needless)
    # ids used twice
    for a, b in zip(evs, evs[1:]):
        if a.id == b.id and a.uid != b.uid and (a.seen or a.acked is not None or b.seen or b.acked is not None):
            v('id re-used', '%s is %s and %s', i(a.id), a.uid, b.uid)
    # published twice in one timeline
    for uid, l in sim.byuid.items():
        for a in l:
            for b in l:
                if a.t < b.t or (a.t == b.t and a.id < b.id):
                    if a.doomed is None and b.doomed is None and (a.lost is None or a.lost > b.t) and (b.lost is None or b.lost > a.t):
                        v('published twice' + '~' * sim.evicted, '%s as %s and %s', uid, i(a.id), i(b.id))
    for uid, id in sim.acks:
        if not any(e.id == id for e in sim.byuid[uid]):
            v('wrong ack', '%s acked as %s', uid, i(id))
    for uid in sim.rejected:
        if any(e.lost is None for e in sim.byuid[uid]):
            v('rejected but published~', '%s', uid)
    payload = {}
    for c in sim.clients:
        p, notified, seen, top, own = None, -1, {}, 0, None
        marks, claims, floor = [], [], 0
        for f in c.log:
            k = f[0]
            if k in 'rc':
                if k == 'r' and any(x.uid not in seen for x in claims):
                    v('recovered:true followed by reset~', 'client%d', c.n)
                claims = []
            if k == 'c':
                own = f[1]
                if isinstance(own, int) and own != p:        # a bogus or fresh id: the client claims this position from here on
                    p, notified, top = own, f[2], 0
                    seen = {}
                    marks.append((f[2], own))
                    floor = own
                if own == '':
                    seen, top = {}, 0
                if c.plain:
                    seen, top, p = {}, 0, None
            elif k == 's':
                p, notified = f[1], f[2]
                marks.append((notified, p))
            elif k == 'w':
                n, h, ok, t = f[1:5]
                if ok and own != '':
                    if n != own:
                        v('welcome', 'client%d: own %s, got %s', c.n, i(own), i(n))
                    for e in evs[bisect_right(ids, n):bisect_right(ids, h)]:
                        if need(e, c) and e.lost is not None and e.lost < t and e.uid not in seen and not (e.lost <= notified):
                            claims.append(e)         # must come from the memory of a node
                    if h < n:
                        v('welcome', 'client%d: head %s < N %s', c.n, i(h), i(n))
                else:
                    if n != h:
                        v('welcome', 'client%d: %s', c.n, f)
                    notified = t
                    marks.append((t, n))
                p = n
            elif k == 'r':
                p, notified = f[1], f[2]
                marks.append((notified, p))
            elif k == 'e':
                e = f[1]
                if e.id in payload and payload[e.id] != e.uid:
                    v('two payloads', 'client%d: %s is %s and %s', c.n, i(e.id), e.uid, payload[e.id])
                payload.setdefault(e.id, e.uid)
                if e.to and e.to != c.user:
                    v('leak', 'client%d (%s) got %s to %s', c.n, c.user, e.uid, e.to)
                if e.lost == -1:
                    v('raw id passed on', 'client%d: %s', c.n, i(e.id))
                if p is None:
                    v('no welcome', 'client%d', c.n)
                    p = e.id - 1
                if e.id <= p:
                    v('order', 'client%d: %s after %s', c.n, i(e.id), i(p))
                elif e.id <= top:
                    v('order across a notice~', 'client%d: %s after %s', c.n, i(e.id), i(top))
                if e.id in seen.values():
                    v('id twice~' if e.id > p else 'id twice', 'client%d: %s', c.n, i(e.id))
                elif e.uid in seen:
                    v('payload again with a new id~', 'client%d: %s', c.n, e.uid)
                for x in evs[bisect_right(ids, p):bisect_left(ids, e.id)]:
                    if need(x, c) and x.uid not in seen and x.t <= f[2] and not (x.lost is not None and x.lost <= notified):
                        v('silent gap', 'client%d: %s -> %s without %s %s%s', c.n, i(p), i(e.id), i(x.id), x.uid,
                          ' (acknowledged, lost by Redis)' if x.lost is not None else '')
                seen[e.uid] = e.id
                top = max(top, e.id)
                p = e.id
        # liveness: all clients are connected now
        if not c.sock or not c.welcomed:
            if sim.now - c.since > 4:
                v('stuck', 'client%d has no welcome', c.n)
            continue
        for x in evs:
            if need(x, c) and x.uid not in seen and x.id > floor:
                if any(t >= x.t and (n >= x.id or (x.lost is not None and x.lost <= t)) for t, n in marks):
                    continue
                if x.doomed is not None:
                    if x.id <= p or any(t >= x.doomed for t, n in marks):
                        v('published by the old primary after the client had moved on~', 'client%d: %s', c.n, x.uid)
                    else:
                        v('not notified', 'client%d at %s: %s %s', c.n, i(p), i(x.id), x.uid)
                elif x.id <= p and x.t > marks[0][0]:
                    v('not notified: below', 'client%d at %s: %s %s', c.n, i(p), i(x.id), x.uid)
                elif x.id > p:
                    v('not notified', 'client%d at %s: %s %s%s', c.n, i(p), i(x.id), x.uid, ' (lost by Redis)' if x.lost is not None else '')
    return bad


# --------------------------------------------------------------------------------------------------------------- scenarios
def scenario(seed, classes):
    r = random.Random(seed)
    cl = set(classes)
    nodes, nc = r.randint(2, 4), r.randint(3, 10)
    users = ['u%d' % i for i in range(r.randint(2, 4))]
    heal = r.uniform(4, 12)
    sc = NS(seed=seed, lseed=seed, nodes=nodes, maxlen=r.choice([3, 6, 12, 50]), feed=r.choice([2, 4, 10]), page=r.choice([1, 2, 5]),
            keep_seen=r.random() < .5, heal=heal, rlag=r.choice([.001, .05, .4, 1.5]), skew=0, double='double' in cl, durable='durable' in cl and r.random() < .5, backlog=r.choice([2.1, 2.1, 3, 1e9]), actions=[])
    if 'skew' in cl:
        sc.skew = r.choice([-2, -.3, -.01, .3, 2])
    sc.clients = [NS(user=r.choice(users), plain=r.random() < .2, slow='slow' in cl and r.random() < .25, node=r.randrange(nodes),
                     t=r.choice([0, 0, r.uniform(0, heal * .7)])) for _ in range(nc)]
    A = sc.actions
    hot = [r.uniform(.3, heal) for _ in range(r.randint(1, 3))]
    heat = r.choice([0, .3, .8])
    def T():
        if r.random() < heat:
            return max(.1, min(heal, r.choice(hot) + r.choice([-1, 1]) * r.expovariate(1 / r.choice([.003, .05, .5]))))
        return r.uniform(.3, heal)
    ext = r.choice([0, .3, .8])
    for _ in range(r.randint(3, 14)):
        t = T()
        src = 'x' if r.random() < ext else r.choice('ccn')
        n = r.randrange(100)
        for _ in range(r.choice([1, 1, 2, 4, 8])):
            t += r.choice([0, .0005, .002, .05])
            A.append((min(t, heal + .5), 'pub', src, n, r.choice(users) if r.random() < .2 else None))
    for _ in range(r.randint(0, 2)):                 # a few just after the heal
        A.append((heal + r.uniform(0, .5), 'pub', r.choice('cnx'), r.randrange(100), None))
    for _ in range(r.randint(0, 12)):
        A.append((T(), 'cdrop', r.randrange(100), r.choice([.05, .3, 1, 3]), r.randrange(100),
                  ('h', r.choice([-3, -1, 0, 1, 2, 5, 10**9])) if 'bogus' in cl and r.random() < .1 else 'fresh' if r.random() < .1 else None))
    kinds = [c for c in classes if c not in ('slow', 'bogus', 'skew', 'double', 'durable')]
    for _ in range(r.choice([0, 1, 1, 2, 2, 3, 4, 5]) if kinds else 0):
        k, t = r.choice(kinds), T()
        if k == 'drop':
            A.append((t, 'drop', r.choice([.1, .5, 1]), r.choice([.2, 1, 3])))
        elif k == 'conn':
            if r.random() < .5:
                A.append((t, 'subdrop', r.randrange(100), r.choice(['cut', 'cut', 'mute', 'deaf'])))
            else:
                A.append((t, 'cmddrop', r.randrange(100), r.choice([0, .01, .3])))
        elif k == 'lag':
            if r.random() < .3:
                A.append((t, 'rlag', r.choice([.5, 2]), r.uniform(.5, 4)))
            else:
                A.append((t, 'lag', r.randrange(100), r.choice([.2, 1]), r.uniform(.5, 3)))
        elif k == 'node':
            A.append((t, 'node', r.randrange(100), r.choice([.1, 1])))
        elif k in ('loss', 'empty') and sc.durable:
            pass                                     # --redis-durable rules that out
        elif k == 'crash':
            A.append((t, 'crash', 'aof', 0, r.choice([.05, .5, 2])))
        elif k == 'loss':
            A.append((t, 'crash', 'loss', r.randint(1, 8), r.choice([.05, .5, 2])))
        elif k == 'empty':
            A.append((t, 'crash', 'empty', 0, r.choice([.05, .5, 2])))
        elif k == 'failover':
            A.append((t, 'failover', 0, r.choice([.1, 1]), r.choice([.5, 3])))
        elif k == 'failback':
            A.append((t, 'failback', r.choice([0, 0, 3, 5]), r.choice([.5, 1.5, 4]), r.random() < .7))
        elif k == 'alone':
            A.append((t, 'alone', r.choice([.5, 2.5, 4])))
        elif k == 'split':
            A.append((t, 'failover', r.choice([.3, 1, 3]), 0, 0))
        elif k == 'flush':
            A.append((t, 'flush'))
        elif k == 'expire':
            A.append((t, 'expire', r.random() < .5))
        elif k == 'evict':
            A.append((t, 'evict', r.choice(['hash', 'stream'])))
        elif k == 'clock':
            A.append((t, 'clock', r.randrange(2), r.choice([-5, -.5, -.05, -2, 1])))
        elif k == 'raw':
            A.append((t, 'raw', r.choice(['far', 'near', 'old']), r.randrange(5)))
        elif k == 'forge':
            A.append((t, 'raw', 'next', 0))
        elif k == 'follow':                            # all clients leave one node for a while
            n = r.randrange(nodes)
            for c in range(nc):
                A.append((t, 'cdrop', c, r.choice([.6, 1.5]), n, None))
    if r.random() < .3:                              # a quiet end: no events after some time
        q = r.choice(hot) + r.choice([0, .01, .5])
        A[:] = [a for a in A if a[1] != 'pub' or a[0] < q]
    A.sort(key=lambda a: a[0])
    return sc


def run(sc, P, trace=False):
    s = Sim(sc, P, trace).run()
    return check(s), s


def shrink(sc, P, kind, budget=3000):
    """Greedy: fewer actions, clients, nodes; other latencies allowed."""
    import copy
    def fails(x):
        nonlocal budget
        for ls in (x.lseed, 1, 2, 3, 4):
            budget -= 1
            y = copy.copy(x)
            y.lseed = ls
            b, _ = run(y, P)
            if any(k == kind for k, _ in b):
                return y
    best = fails(sc)
    if not best:
        return sc
    changed = True
    while changed and budget > 0:
        changed = False
        n = max(1, len(best.actions) // 2)
        while n >= 1 and budget > 0:
            i = 0
            while i < len(best.actions) and budget > 0:
                x = copy.copy(best)
                x.actions = best.actions[:i] + best.actions[i + n:]
                y = fails(x)
                if y:
                    best, changed = y, True
                else:
                    i += n
            n //= 2
        for i in range(len(best.clients) - 1, -1, -1):
            if len(best.clients) > 1 and budget > 0:
                x = copy.copy(best)
                x.clients = best.clients[:i] + best.clients[i + 1:]
                y = fails(x)
                if y:
                    best, changed = y, True
        for k, val in (('nodes', 1), ('nodes', 2), ('maxlen', 50), ('feed', 10), ('rlag', .001), ('rlag', .4)):
            if getattr(best, k) != val and (k != 'nodes' or val < best.nodes):
                x = copy.copy(best)
                setattr(x, k, val)
                y = fails(x)
                if y:
                    best, changed = y, changed or k == 'nodes'
    return best


def sweep(P, n, first, classes, quiet=False, stop=None):
    hits, ex, runs, stat = Counter(), defaultdict(list), 0, Counter()
    t0 = time.time()
    for seed in range(first, first + n):
        b, s = run(scenario(seed, classes), P)
        runs += 1
        stat['events'] += len(s.events)
        stat['lost'] += sum(e.lost is not None for e in s.events)
        stat['resets'] += sum(f[0] == 'r' for c in s.clients for f in c.log)
        stat['true'] += sum(f[0] == 'w' and f[3] for c in s.clients for f in c.log)
        stat['false'] += sum(f[0] == 'w' and not f[3] for c in s.clients for f in c.log)
        for k in {k for k, _ in b}:
            hits[k] += 1
            ex[k].append(seed)
        if stop and any(not k.endswith('~') for k in hits):
            break
    if not quiet:
        print('%d seeds in %.0f s: %s' % (runs, time.time() - t0, dict(stat)))
        for k, c in sorted(hits.items()):
            print('  %-50s %6d  e.g. %s' % (k, c, ex[k][:4]))
        if not hits:
            print('  clean')
    return hits, ex, runs


if __name__ == '__main__':
    av = sys.argv[1:]
    if not av:
        sys.exit(__doc__)
    def classes(x):
        return [c for c in x.split(',') if c]
    if av[0] == 'run':
        n = int(av[2]) if len(av) > 2 else 2000
        first = int(av[3]) if len(av) > 3 else 0
        sweep(rules(av[1]), n, first, classes(av[4]) if len(av) > 4 else SAFE)
    elif av[0] == 'proof':
        n, first = (int(av[1]) if len(av) > 1 else 2000), (int(av[2]) if len(av) > 2 else 0)
        failovers = 'failover failback alone failback conn node drop slow crash durable'.split()
        fine = True
        for cls in (SAFE, failovers):
            hits, ex, runs = sweep(rules('final'), n, first, cls)
            fine = fine and not any(not k.endswith('~') for k in hits)
        # Seeds that show the faults of earlier rules for the epoch.
        for spec, seed, kind in (('final+token=run&replid2', 453, 'id re-used'), ('final+fresh=100', 1023, 'id re-used'),
                                 ('final-copies', 2836, 'id re-used'), ('final-started', 502611, 'id re-used')):
            found = {k for k, _ in run(scenario(seed, failovers), rules(spec))[0]}
            print('%s, seed %d: %s' % (spec, seed, kind if kind in found else 'not noticed'))
            fine = fine and kind in found
        sys.exit(0 if fine else 1)
    elif av[0] == 'show':
        P, seed = rules(av[1]), int(av[2])
        cls = classes(av[3]) if len(av) > 3 else SAFE
        sc = scenario(seed, cls)
        b, _ = run(sc, P)
        kinds = Counter(k for k, _ in b)
        print(dict(kinds))
        kind = av[4] if len(av) > 4 else next((k for k in kinds if not k.endswith('~')), next(iter(kinds), None))
        if kind:
            sc = shrink(sc, P, kind)
            b, s = run(sc, P, True)
            print('nodes %d maxlen %d feed %d rlag %s keep_seen %s clients %s' % (sc.nodes, sc.maxlen, sc.feed, sc.rlag, sc.keep_seen,
                  ['%s%s%s@%d' % (c.user, ' plain' if c.plain else '', ' slow' if c.slow else '', c.node) for c in sc.clients]))
            for a in sc.actions:
                print('  action', tuple(round(x, 3) if isinstance(x, float) else x for x in a))
            print('\n'.join(s.trace[:150]))
            for x in b[:6]:
                print('VIOLATION', *x)
    elif av[0] == 'mutations':
        n = int(av[1]) if len(av) > 1 else 300
        for r in 'continuity new_epoch fill_gaps verify dedupe filter_to sticky probe window fresh_node'.split():
            for base in ('written', 'final'):
                h, _, k = sweep(rules(base + '-' + r), n, 0, SAFE + ['raw', 'raw'], quiet=True)
                print('%-8s without %-11s %s' % (base, r, {k: v for k, v in h.most_common() if not k.endswith('~')} or 'not noticed'))
    elif av[0] == 'ablate':
        n = int(av[1]) if len(av) > 1 else 2000
        cls = classes(av[2]) if len(av) > 2 else SAFE
        for r in ['epoch', 'base', 'always', 'opens', 'gap', 'inner', 'ack_seen', 'new_epoch', 'window', 'fresh_node', 'ahead=naive', 'ahead=skip']:
            h, ex, k = sweep(rules('final' + ('-' + r if '=' not in r else '+' + r)), n, 0, cls, quiet=True)
            hard = {k: (v, ex[k][0]) for k, v in h.most_common() if not k.endswith('~')}
            print('final but %-12s %s   measured: %s' % (r, hard or 'clean in %d' % k, {k: v for k, v in h.items() if k.endswith('~')}))
