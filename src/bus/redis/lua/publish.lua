-- Publishes a batch of events to a channel, once per number.
-- KEYS[1] P:{C}
-- ARGV:
--    1 durable (1 or 0)
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
--    then for each event: its text up to the id's digits, and the user it is for or ''
-- Returns {1, first id, base, head}; or {0, 0, base, head}: the events may or may not have been
-- published, and never will be.
-- Without events it returns the outcome of an earlier attempt, or {2, 0, base, head} if that was
-- not published. That attempt can't be published later either, since its number is used up then.
local epoch = current_epoch(prefix_of(KEYS[1]), ARGV[1] == '1')

-- Deletes the numbers of nodes that last published here before `oldest` (seconds): they have
-- nothing left to retry. Each process has a name of its own, so the numbers would accumulate.
local function delete_old_numbers(meta, oldest)
  local fields = redis.call('HGETALL', meta)
  for i = 1, #fields, 2 do
    local last = string.find(fields[i], '^from:') and tonumber(string.match(fields[i + 1], ' (%d+)$'))
    if last and last < oldest then
      redis.call('HDEL', meta, fields[i])
    end
  end
end

local function publish()
  local name = KEYS[1]
  local ttl = tonumber(ARGV[2])
  local number, known = tonumber(ARGV[8]), tonumber(ARGV[4])
  local head, base = checked_position(name, epoch, ttl, tonumber(ARGV[3]), known)

  local key = ARGV[11] ~= '' and key_name(name, ARGV[11])
  local earlier = key and published_with(key)
  if earlier then
    return {1, earlier, base, head}
  end

  -- A node's last number is in `meta`. If that is evicted, so is the sequence, and the base
  -- changes.
  local meta, from = name .. ':meta', 'from:' .. ARGV[7]
  local now = math.floor(clock() / 1000000)
  local stored = redis.call('HGET', meta, from)
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
    delete_old_numbers(meta, now - math.ceil(ARGV[10] / 1000))
  end
  if ARGV[9] == '1' and base ~= known then
    -- The outcome of the first attempt is unknown: its number may have been lost with the old
    -- epoch.
    return {0, 0, base, head}
  end

  if #ARGV < 13 then
    redis.call('HSET', meta, from, ARGV[8] .. ' 0 ' .. show(now))
    return {2, 0, base, head}
  end
  local first = head + 1
  local messages
  head, messages = append(name, head, ARGV, 13, tonumber(ARGV[5]), tonumber(ARGV[12]), ttl)
  redis.call('HSET', meta, from, ARGV[8] .. ' ' .. show(first) .. ' ' .. show(now))
  if key then
    redis.call('SET', key, show(first), 'PX', KEY_TTL)
  end
  publish_messages(name, messages, ARGV[6])
  return {1, first, base, head}
end

return guarded(KEYS[1], publish)
