-- Compares the positions of channels and renews the expiry of their keys.
-- KEYS[1] the Pub/Sub channel of the node's probes: see `channel_of`
-- ARGV:
--    1 kind of Redis: durable, volatile or cluster
--    2 history ttl in ms
--    3 prefix
--    4 number of the probe
--    then for each channel: its name, the highest id seen, the base known
-- Publishes the number, then for each channel a line "name base head", or "name FAULT key: text" if
-- its data is damaged, or "name TRYAGAIN text" if a cluster has its keys elsewhere or is down
-- ("@cluster" then, too).
local topic, ttl = channel_of(KEYS, ARGV), tonumber(ARGV[2])
local epoch = current_epoch(ARGV[3], ARGV[1], milliseconds()) -- even without channels, so that a promotion is noticed in time

local function compare(name, seen, known)
  local head, base = checked_position(name, epoch, ttl, tonumber(seen), tonumber(known))
  local meta = name .. ':meta'
  local unused = head == base and redis.call('PTTL', meta) <= UNUSED_TTL -- it has had no event so far
  redis.call('PEXPIRE', meta, expiry(name, ttl, unused))
  return show(base) .. ' ' .. show(head)
end

local lines = {ARGV[4]}
if ARGV[1] == 'cluster' and not string.find(redis.call('CLUSTER', 'INFO'), 'cluster_state:ok', 1, true) then
  lines[2] = '@cluster ' .. CLUSTER_DOWN
end
for i = 5, #ARGV, 3 do
  local name = ARGV[3] .. ':{' .. ARGV[i] .. '}'
  local line = guarded(name, compare, name, ARGV[i + 1], ARGV[i + 2])
  lines[#lines + 1] = ARGV[i] .. ' ' .. (line.err or line)
end
return redis.call('PUBLISH', topic, table.concat(lines, '\n'))
