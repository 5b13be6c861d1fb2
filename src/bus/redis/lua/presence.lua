-- Users in a channel, over all nodes. Keys of the channel `name`:
--    :members         hash: each user with the number of nodes where they are; the field '' holds
--                     "<generation> <version> <settled>"
--    :members:<node>  set: the users of a node
--    :nodes           hash: each node with "<deadline> <number> <size> <mark>"; the field '' holds
--                     "<generation> <epoch> <last use>". Marks: 0 none, 1 some of its users
--                     are removed, 2 its lease was renewed without a call
--    :presence        stream for backends: joins, leaves and resets
-- Times are in milliseconds.
--
-- The keys are one whole: if any of them is lost or does not match the others, or the epoch of the data
-- is another one, a new generation starts without users, and every node adds its own again. The
-- version is the number of joins and leaves in a generation. `settled` is when all nodes had time
-- to do so.

-- A node that has not called for this long is gone: ten seconds in which its clients may come back
-- to another node, and the time between two calls. bus/redis/presence.rs has the same time.
local LEASE = 12000
-- Without any call for this long, Redis may have been away from all nodes: their leases start again,
-- each once until its node calls.
local AWAY_AFTER = 5000
-- Time in which the nodes add their users again after a loss.
local SETTLE_TIME = 5000
-- How long the keys outlive the last call.
local PRESENCE_TTL = 60 * 60 * 1000
-- Most users of nodes that are gone that one call removes: some 3 ms.
local SWEEP_USERS = 500

-- The marks of nodes.
local CALLED, SWEPT, RENEWED = 0, 1, 2

-- An error: the keys don't match each other.
local LOST = {}

local function log_presence(state, kind, user)
  local stream = state.stream
  if user then
    redis.call('XADD', stream, 'MAXLEN', '~', state.history, '*', 'event', kind, 'user', user)
  else
    redis.call('XADD', stream, 'MAXLEN', '~', state.history, '*', 'event', kind)
  end
  state.logged = true
end

-- Starts a generation without users. `lost`: users may have been stored.
local function start_generation(state, lost)
  redis.call('UNLINK', state.members, state.nodes)
  state.generation = show(math.max(clock(), tonumber(state.generation or 0) + 1))
  state.version, state.settled, state.at, state.entries = 0, lost and state.now + SETTLE_TIME or 0, state.now, {}
  if lost or redis.call('EXISTS', state.stream) == 1 then
    log_presence(state, 'reset')
  end
  state.changed = true
end

local function new_state(name, epoch, now, history, ttl)
  return {
    members = name .. ':members', nodes = name .. ':nodes', stream = name .. ':presence',
    epoch = epoch, now = now, history = history, ttl = ttl, entries = {},
  }
end

-- Reads the state of a channel. Returns whether it is whole and of this epoch; if not, whether there
-- are remains of another.
local function load_state(state)
  local header, nodes = redis.call('HGET', state.members, ''), redis.call('HGETALL', state.nodes)
  local generation, version, settled = string.match(header or '', '^(%d+) (%d+) (%d+)$')
  local nodes_header
  for i = 1, #nodes, 2 do
    if nodes[i] == '' then
      nodes_header = nodes[i + 1]
    else
      local deadline, number, size, mark = string.match(nodes[i + 1], '^(%d+) (%d+) (%d+) ([012])$')
      if not deadline or not is_id(tonumber(number)) then
        error(LOST)
      end
      state.entries[nodes[i]] = {
        deadline = tonumber(deadline), number = tonumber(number), size = tonumber(size), mark = tonumber(mark),
      }
    end
  end
  generation = generation and is_id(tonumber(generation)) and generation or nil
  local same, written, at = string.match(nodes_header or '', '^(%d+) (%x+) (%d+)$')
  state.generation, state.version, state.settled, state.at = generation, tonumber(version), tonumber(settled), tonumber(at)
  return generation and generation == same and written == state.epoch, header or #nodes > 0
end

-- Loads the state of a channel for a node that has stored users in `generation`, or 0. If it is not
-- whole, a generation starts. If a node without users has started one after a loss, the others learn
-- from this node that users were lost.
local function load_generation(state, generation)
  local is_whole, has_remains = load_state(state)
  local has_users = generation ~= '0'
  if not is_whole then
    start_generation(state, has_remains or has_users)
  elseif has_users and generation ~= state.generation and state.settled == 0 then
    state.settled, state.changed = state.now + SETTLE_TIME, true
    log_presence(state, 'reset')
  end
end

local function set_of(state, node)
  return state.members .. ':' .. node
end

local function write_entry(state, node, entry)
  local text = string.format('%.0f %.0f %.0f %d', entry.deadline, entry.number, entry.size, entry.mark)
  redis.call('HSET', state.nodes, node, text)
end

local function drop_entry(state, node)
  state.entries[node] = nil
  redis.call('HDEL', state.nodes, node)
end

-- A node has this user now.
local function count_up(state, user)
  if redis.call('HINCRBY', state.members, user, 1) == 1 then
    state.version, state.changed = state.version + 1, true
    log_presence(state, 'join', user)
  end
end

-- A node no longer has this user.
local function count_down(state, user)
  local nodes = redis.call('HINCRBY', state.members, user, -1)
  if nodes < 0 then
    error(LOST)
  elseif nodes == 0 then
    redis.call('HDEL', state.members, user)
    state.version, state.changed = state.version + 1, true
    log_presence(state, 'leave', user)
  end
end

-- Removes users of nodes that are gone, at most `budget` of them. Returns the rest of the budget, and
-- whether there may be more.
local function sweep(state, budget)
  -- The clock may have been set back, too.
  local was_away = state.now - state.at > AWAY_AFTER or state.now < state.at
  local most, more = state.now + LEASE, false
  for node, entry in pairs(state.entries) do
    local is_renewed = was_away and entry.mark == CALLED
    if is_renewed or entry.deadline > most then
      entry.deadline, entry.mark = most, is_renewed and RENEWED or entry.mark
      write_entry(state, node, entry)
    elseif entry.deadline < state.now and budget == 0 then
      more = true
    elseif entry.deadline < state.now then
      local users = redis.call('SPOP', set_of(state, node), budget)
      for _, user in ipairs(users) do
        count_down(state, user)
      end
      entry.size = entry.size - #users
      if #users < budget then
        if entry.size ~= 0 then
          error(LOST)
        end
        drop_entry(state, node)
      else
        entry.mark, more = SWEPT, true
        write_entry(state, node, entry)
      end
      budget = budget - #users
    end
  end
  state.at = state.now
  return budget, more
end

local function save(state)
  if state.changed then
    redis.call('HSET', state.members, '', string.format('%s %.0f %.0f', state.generation, state.version, state.settled))
  end
  redis.call('HSET', state.nodes, '', string.format('%s %s %.0f', state.generation, state.epoch, state.at))
  redis.call('PEXPIRE', state.members, PRESENCE_TTL)
  redis.call('PEXPIRE', state.nodes, PRESENCE_TTL)
  if state.logged then
    redis.call('PEXPIRE', state.stream, state.ttl)
  end
end

local function error_text(failure)
  return type(failure) == 'table' and failure.err or tostring(failure)
end

-- Handles damaged keys: starts a new generation. Other errors are raised again. Values of the wrong
-- type, which another program has put there, are deleted. `set` is the set of the calling node.
local function repair(state, failure, set)
  local text = error_text(failure)
  if failure ~= LOST and not string.find(text, '^WRONGTYPE') and not string.find(text, 'not an integer') then
    error(failure)
  end
  if redis.call('TYPE', state.stream).ok ~= 'stream' then
    redis.call('UNLINK', state.stream)
  end
  if set then
    redis.call('UNLINK', set)
  end
  start_generation(state, true)
  save(state)
end
