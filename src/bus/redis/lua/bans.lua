-- Reads all bans, and the position of the control channel at that moment.
-- KEYS[1] P:{@control}: see `channel_of`
-- ARGV:
--    1 kind of Redis: durable, volatile or cluster
--    2 history ttl in ms
--    3 the highest id seen
--    4 the base known
-- Returns {now in ms, base, head, user, end in ms, user, end in ms, ...}.
local now, name = milliseconds(), channel_of(KEYS, ARGV)
local epoch = current_epoch(prefix_of(name), ARGV[1], now)

return guarded(name, function()
  local head, base = checked_position(name, epoch, tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4]))
  local reply = {now, base, head}
  for i, part in ipairs(redis.call('ZRANGE', bans_key(name, now), 0, -1, 'WITHSCORES')) do
    reply[#reply + 1] = i % 2 == 1 and part or tonumber(part)
  end
  return reply
end)
