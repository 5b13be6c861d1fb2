-- Publishes a batch of events to a channel, once per number.
-- KEYS[1] P:{C}: see `channel_of`
-- ARGV:
--    1 kind of Redis: durable, volatile or cluster
--    2 history ttl in ms
--    3 the highest id seen
--    4 the base known
--    5 history in events
--    6 the Pub/Sub channel of the same name or ''
--    7 node
--    8 number of the call
--    9 retry (1 or 0)
--    10 how long the number is remembered, in ms
--    11 the idempotency key of the only event or ''
--    12 history in bytes
--    then runs of events, as `append` takes them
-- Returns {1, first id, base, head}; or {0, 0, base, head}: the events may or may not have been
-- published, and never will be.
-- Without events it returns the outcome of an earlier attempt, or {2, 0, base, head} if that was
-- not published. That attempt can't be published later either, since its number is used up then.
local now, name = milliseconds(), channel_of(KEYS, ARGV)
local epoch, is_copied = current_epoch(prefix_of(name), ARGV[1], now)

local function publish()
  local settings = {ttl = tonumber(ARGV[2]), history = tonumber(ARGV[5]), bytes = tonumber(ARGV[12])}
  local number, known = tonumber(ARGV[8]), tonumber(ARGV[4])
  -- A node's last number is in `meta`. If that is evicted, so is the sequence, and the base
  -- changes.
  local meta, from = name .. ':meta', 'from:' .. ARGV[7]
  local head, base, bytes, kept, stored = checked_position(name, epoch, settings.ttl, tonumber(ARGV[3]), known, from)

  local key = ARGV[11] ~= '' and key_name(name, ARGV[11])
  local earlier = key and published_with(name, key)
  if earlier then
    return {1, earlier, base, head}
  end

  local seconds = math.floor(now / 1000)
  if stored then
    local last, first = string.match(stored, '^(%d+) (%d+) ')
    if number <= tonumber(last) then
      first = tonumber(first)
      if number == tonumber(last) and first > base then
        return {1, first, base, head}
      end
      return {0, 0, base, head}
    end
  else
    delete_old_numbers(meta, seconds - math.ceil(ARGV[10] / 1000))
  end
  if ARGV[9] == '1' and base ~= known then
    -- The outcome of the first attempt is unknown: its number may have been lost with the old
    -- epoch.
    return {0, 0, base, head}
  end

  if #ARGV < 13 then
    redis.call('HSET', meta, from, ARGV[8] .. ' 0 ' .. show(seconds))
    return {2, 0, base, head}
  end
  local first = head + 1
  local messages
  head, messages = append(name, head, bytes, kept, ARGV, 13, settings, now,
    {from, ARGV[8] .. ' ' .. show(first) .. ' ' .. show(seconds)})
  if key then
    redis.call('SET', key, show(first), 'PX', KEY_TTL)
  end
  publish_messages(name, messages, ARGV[6], is_copied)
  return {1, first, base, head}
end

return guarded(name, publish)
