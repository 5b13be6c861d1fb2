-- Commands to all nodes about the connections of a user. They are events of the channel P:{@control}.
-- The set P:{@control}:bans holds the banned users, by the time at which their bans end.

-- Most users banned at once. limits/bans.rs has the same number.
local BANS_MAX = 10000

-- Commands kept for nodes that are cut off meanwhile: 10,000 with ids of common length have about 1 MB.
local KEPT_COMMANDS, KEPT_BYTES = 10000, 4 * 2 ^ 20

-- Longest ban in milliseconds: a year. protocol/control.rs has the same.
local BAN_MAX = 365 * 24 * 60 * 60 * 1000

-- The key of the bans, from which expired ones are removed.
local function bans_key(name, now)
  local bans = name .. ':bans'
  check_arrived(bans, name .. ':meta')
  local removed = redis.pcall('ZREMRANGEBYSCORE', bans, '-inf', show(now))
  if type(removed) == 'table' then
    if string.find(removed.err, '^WRONGTYPE') then
      fault(bans, 'another program has put a value of the wrong type there: delete this key')
    end
    error(removed)
  end
  return bans
end

-- Stores and publishes a command: 'disconnect' (from `channel`, or from all if that is ''), 'ban' for
-- `time` milliseconds, or 'unban'. Returns its id, or nil if as many users as may are banned.
local function order(name, ttl, kind, seen, known, action, user, channel, time)
  local now = milliseconds()
  local epoch, is_copied = current_epoch(prefix_of(name), kind, now)
  local head, _, bytes, kept = checked_position(name, epoch, ttl, seen, known)
  local bans, ends = bans_key(name, now), show(now + time)
  local item = '{"command":"' .. action .. '","user":' .. cjson.encode(user)
  if action == 'ban' then
    if not redis.call('ZSCORE', bans, user) and redis.call('ZCARD', bans) >= BANS_MAX then
      return nil
    end
    item = item .. ',"until":' .. ends
  elseif channel ~= '' then
    item = item .. ',"channel":"' .. channel .. '"'
  end
  local settings = {ttl = math.max(ttl, CONTROL_TTL), history = KEPT_COMMANDS, bytes = KEPT_BYTES}
  local messages
  head, messages = append(name, head, bytes, kept, {'', 1, item .. ',"id":'}, 1, settings, now, {})
  if action == 'ban' then
    redis.call('ZADD', bans, ends, user)
    local last = tonumber(redis.call('ZRANGE', bans, -1, -1, 'WITHSCORES')[2])
    redis.call('PEXPIREAT', bans, show(math.min(last, now + BAN_MAX))) -- other programs may write any number
  elseif action == 'unban' then
    redis.call('ZREM', bans, user)
  end
  publish_messages(name, messages, '', is_copied)
  return head
end
