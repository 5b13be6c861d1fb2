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
--    then for each channel: its name; the generation in which the node has stored users, or 0; the
--    number of users to add, the number of those to remove, and both
-- Returns a text for each channel:
--    "ok <generation>", and " more" if users of nodes that are gone are left
--    "lost": nothing was changed, and the node must store all its users again with generation 0
--    "late <number>": a call with this number came before
--    "FAULT <text>": an error
local now = milliseconds()
local epoch = current_epoch(ARGV[2], ARGV[1], now)
local node, number, budget = ARGV[3], tonumber(ARGV[4]), SWEEP_USERS

local function update(state, generation, from, adds, removes)
  local is_whole, has_remains = load_state(state)
  if not is_whole then
    start_generation(state, has_remains or generation ~= '0')
  end
  local set, entry = set_of(state, node), state.entries[node]
  if entry and number < entry.number then
    return 'late ' .. show(entry.number)
  end
  if generation ~= '0' and (generation ~= state.generation or not entry or entry.swept) then
    save(state)
    return 'lost'
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
  entry.deadline, entry.number, entry.swept = now + LEASE, number, false
  write_entry(state, node, entry)
  redis.call('PEXPIRE', set, PRESENCE_TTL)
  local more
  budget, more = sweep(state, budget)
  save(state)
  return 'ok ' .. state.generation .. (more and ' more' or '')
end

local replies, at = {}, 7
while at <= #ARGV do
  local name, generation = ARGV[2] .. ':{' .. ARGV[at] .. '}', ARGV[at + 1]
  local adds, removes = tonumber(ARGV[at + 2]), tonumber(ARGV[at + 3])
  local state = new_state(name, epoch, now, ARGV[5], ARGV[6])
  local done, result = pcall(function()
    return update(state, generation, at + 4, adds, removes)
  end)
  if not done then
    local failed
    done, failed = pcall(repair, state, result, set_of(state, node))
    result = done and 'lost' or 'FAULT ' .. error_text(failed)
  end
  replies[#replies + 1] = result
  at = at + 4 + adds + removes
end
return replies
