-- Reads some of the users in a channel, and removes users of nodes that are gone.
-- KEYS[1] P:{C}
-- ARGV:
--    1 kind of Redis: durable, volatile or cluster
--    2 most entries of the stream for backends
--    3 its ttl in ms
--    4 cursor: 0, or that of the last reply
--    5 about how many users
--    6 the generation in which the node has stored users, or 0
-- Returns {status, number of users, next cursor (0 at the end), user, user, ...}. The status is "ok",
-- "more" if users of nodes that are gone are left, or "settling" if nodes add their users again after
-- a loss.
local now = milliseconds()
local epoch = current_epoch(prefix_of(KEYS[1]), ARGV[1], now)
local state = new_state(KEYS[1], epoch, now, ARGV[2], ARGV[3])

local function read()
  if ARGV[6] == '0' and redis.call('EXISTS', state.members, state.nodes) == 0 then
    return {'ok', 0, '0'}
  end
  load_generation(state, ARGV[6])
  local _, more = sweep(state, SWEEP_USERS)
  save(state)
  if more or now < state.settled then
    return {more and 'more' or 'settling', 0, '0'}
  end
  local found = redis.call('HSCAN', state.members, ARGV[4], 'COUNT', ARGV[5])
  local reply = {'ok', redis.call('HLEN', state.members) - 1, found[1]}
  for i = 1, #found[2], 2 do
    if found[2][i] ~= '' then
      reply[#reply + 1] = found[2][i]
    end
  end
  return reply
end

local done, result = pcall(read)
if done then
  return result
end
repair(state, result)
return {'settling', 0, '0'}
