-- Reads all bans.
-- KEYS[1] P:{@control}: see `channel_of`
-- ARGV[1] kind of Redis: durable, volatile or cluster
-- Returns {now in ms, user, end in ms, user, end in ms, ...}.
local name = channel_of(KEYS, ARGV)
is_cluster = ARGV[1] == 'cluster'

return guarded(name, function()
  local now = milliseconds()
  local reply = {now}
  for i, part in ipairs(redis.call('ZRANGE', bans_key(name, now), 0, -1, 'WITHSCORES')) do
    -- Other programs may write any number, even infinity.
    reply[#reply + 1] = i % 2 == 1 and part or math.min(tonumber(part), ID_LIMIT)
  end
  return reply
end)
