-- How many messages the inbox of a channel has.
-- KEYS[1] P:{C}
-- ARGV: 1 expiry of an inbox without messages in ms, or 0
-- Returns {messages, age of the oldest in ms}.
local stream = KEYS[1] .. ':inbox'
local count = redis.call('XLEN', stream)
if count == 0 then
  if ARGV[1] ~= '0' and redis.call('PTTL', stream) == -1 then
    redis.call('PEXPIRE', stream, ARGV[1]) -- inbox.lua removes it with the next message
  end
  return {0, 0}
end
local oldest = redis.call('XRANGE', stream, '-', '+', 'COUNT', 1)[1]
local time = redis.call('TIME')
local now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
return {count, math.max(0, now - tonumber(string.match(oldest[1], '^%d+')))}
