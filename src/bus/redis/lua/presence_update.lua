-- Stores which users a node has in some channels, renews the node's leases, and removes users of
-- nodes that are gone.
-- KEYS[1] the Pub/Sub channel of the node's probes
-- ARGV:
--    1 kind of Redis: durable, volatile or cluster
--    2 prefix
--    3 node
--    4 number of the call, which rises: a call that arrives after a later one changes nothing
--    5 most entries of the stream for backends
--    6 its ttl in ms
--    then for each channel: its name; the generation in which the node has stored users, or 0; most
--    users to list, or '' if nobody wants to know who is in the channel; generation, version and last
--    entry of the stream that the node has seen; the number of users to add, the number of those to
--    remove, and both
-- Returns for each channel a list that starts with a text:
--    "ok <generation>", and " more" if users of nodes that are gone are left
--    "lost": nothing was changed, and the node must store all its users again with generation 0
--    "late <number>": a call with this number came before
--    "FAULT <text>": an error
-- If the node wants to know who is in the channel, "ok" is followed by the version, the last entry of the
-- stream, 1 or 0 (nodes add their users again after a loss), a kind, and what it says:
--    "same"
--    "changes": since the version that the node has seen, "+<user>" or "-<user>" for each
--    "all": the users
--    "count": their number, which is greater than the limit
local now = milliseconds()
local epoch = current_epoch(ARGV[2], ARGV[1], now)
local node, number, budget = ARGV[3], tonumber(ARGV[4]), SWEEP_USERS

-- Joins and leaves after an entry of the stream, or nil unless there are exactly this many.
local function read_changes(state, last, count)
  local entries, changes = redis.call('XRANGE', state.stream, '(' .. last, '+', 'COUNT', count + 1), {}
  if #entries ~= count then
    return nil
  end
  for i, entry in ipairs(entries) do
    local kind, user = entry[2][2], entry[2][4]
    if not user or kind ~= 'join' and kind ~= 'leave' then
      return nil
    end
    changes[i] = (kind == 'join' and '+' or '-') .. user
  end
  return changes, count > 0 and entries[count][1] or last
end

-- Adds to a reply who is in the channel.
local function add_view(reply, state, limit, generation, version, last)
  local count, settled = redis.call('HLEN', state.members) - 1, state.now >= state.settled
  local kind, items, newest = 'count', {show(count)}, '0-0'
  if count <= limit then
    local missing = generation == state.generation and settled and state.version - tonumber(version)
    items = nil
    if missing and missing >= 0 and missing <= limit then
      kind = missing == 0 and 'same' or 'changes'
      items, newest = read_changes(state, last, missing)
    end
    if not items then
      local entry = redis.call('XREVRANGE', state.stream, '+', '-', 'COUNT', 1)[1]
      kind, items, newest = 'all', redis.call('HKEYS', state.members), entry and entry[1] or '0-0'
    end
  end
  for _, item in ipairs({show(state.version), newest, settled and '1' or '0', kind}) do
    reply[#reply + 1] = item
  end
  for _, item in ipairs(items) do
    if item ~= '' then
      reply[#reply + 1] = item
    end
  end
  return reply
end

local function update(state, at, adds, removes)
  local generation, from = ARGV[at + 1], at + 8
  load_generation(state, generation)
  local set, entry = set_of(state, node), state.entries[node]
  if entry and number < entry.number then
    return {'late ' .. show(entry.number)}
  end
  if generation ~= '0' and (generation ~= state.generation or not entry or entry.mark == SWEPT) then
    save(state)
    return {'lost'}
  end
  if not entry then
    redis.call('UNLINK', set) -- of an earlier generation
    entry = {size = 0}
    state.entries[node] = entry
  end
  if redis.call('SCARD', set) ~= entry.size then
    error(LOST)
  end
  for i = from, from + adds - 1 do
    if redis.call('SADD', set, ARGV[i]) == 1 then
      entry.size = entry.size + 1
      count_up(state, ARGV[i])
    end
  end
  for i = from + adds, from + adds + removes - 1 do
    if redis.call('SREM', set, ARGV[i]) == 1 then
      entry.size = entry.size - 1
      count_down(state, ARGV[i])
    end
  end
  entry.deadline, entry.number, entry.mark = now + LEASE, number, CALLED
  write_entry(state, node, entry)
  redis.call('PEXPIRE', set, PRESENCE_TTL)
  local more
  budget, more = sweep(state, budget)
  save(state)
  local reply = {'ok ' .. state.generation .. (more and ' more' or '')}
  if ARGV[at + 2] ~= '' then
    add_view(reply, state, tonumber(ARGV[at + 2]), ARGV[at + 3], ARGV[at + 4], ARGV[at + 5])
  end
  return reply
end

local replies, at = {}, 7
while at <= #ARGV do
  local adds, removes = tonumber(ARGV[at + 6]), tonumber(ARGV[at + 7])
  local state = new_state(ARGV[2] .. ':{' .. ARGV[at] .. '}', epoch, now, ARGV[5], ARGV[6])
  local done, result = pcall(update, state, at, adds, removes)
  if not done then
    budget = 0 -- the function may have removed users
    local failure
    done, failure = pcall(repair, state, result, set_of(state, node))
    result = {done and 'lost' or 'FAULT ' .. error_text(failure)}
  end
  replies[#replies + 1] = result
  at = at + 8 + adds + removes
end
return replies
