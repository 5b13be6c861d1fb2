-- Checks what a node needs. P is the prefix, C a channel.
-- ARGV: 1 a channel P:{C}, 2 the Pub/Sub channel of the node's probes, 3 P:settings, 4 kind of Redis:
-- durable, volatile or cluster, 5 whether there is --presence: 1 or 0, then the --pubsub-channels. It
-- has no KEYS: on a cluster they would be in several slots.
-- Returns {commands that the user's ACL forbids, commands and INFO fields that this Redis lacks},
-- as texts.
local name, probe, settings, kind, presence = unpack(ARGV)
local meta, events = name .. ':meta', name .. ':events'
local control = string.match(name, '^(.-):{') .. ':{@control}'
local bans, commands = control .. ':bans', control .. ':events'
local epoch_key = string.match(name, '^(.-):{') .. ':epoch'
local needed = {
  {'SUBSCRIBE', name, name .. ':to', name .. ':pubsub', probe},
  {'UNSUBSCRIBE'},
  {'PUBLISH', name, 'x'},
  {'PUBLISH', name .. ':to', 'x'},
  {'PUBLISH', probe, 'x'},
  {'PING'}, {'TIME'}, {'INFO'},
  {'HMGET', meta, 'head'}, {'HSET', meta, 'head', '1'}, {'HDEL', meta, 'head'}, {'PEXPIRE', meta, '1'},
  {'HMGET', epoch_key, 'epoch'}, {'HSET', epoch_key, 'epoch', 'x'}, {'DEL', epoch_key},
  {'XADD', events, '*', 'e', 'x'}, {'XRANGE', events, '-', '+'}, {'XREVRANGE', events, '+', '-'},
  {'XTRIM', events, 'MINID', '1'}, {'PEXPIRE', events, '1'}, {'DEL', events},
  {'HGETALL', meta},
  {'XLEN', name .. ':inbox'}, {'MEMORY', 'USAGE', name .. ':inbox'}, {'XADD', name .. ':inbox', '*', 'e', 'x'}, {'PERSIST', name .. ':inbox'}, {'PTTL', meta},
  {'GET', name .. ':key:x'}, {'SET', name .. ':key:x', 'x'},
  {'SUBSCRIBE', control, control .. ':to'}, {'PUBLISH', control, 'x'},
  {'HSET', control .. ':meta', 'head', '1'}, {'XADD', commands, '*', 'e', 'x'}, {'XRANGE', commands, '-', '+'},
  {'PEXPIREAT', bans, '1'},
  {'ZADD', bans, '1', 'x'}, {'ZREM', bans, 'x'}, {'ZREMRANGEBYSCORE', bans, '-inf', '1'},
  {'ZSCORE', bans, 'x'}, {'ZCARD', bans}, {'ZRANGE', bans, '0', '-1', 'WITHSCORES'},
  {'TYPE', settings}, {'DEL', settings}, {'HSET', settings, 'x', 'x'}, {'PEXPIRE', settings, '1'},
}
if kind == 'cluster' then
  for _, command in ipairs({{'CLUSTER', 'SLOTS'}, {'CLUSTER', 'INFO'}, {'ASKING'}, {'EXISTS', meta, events}}) do
    needed[#needed + 1] = command
  end
end
if presence == '1' then
  local members, set, nodes, stream = name .. ':members', name .. ':members:x', name .. ':nodes', name .. ':presence'
  for _, command in ipairs({
    {'HGET', members, 'x'}, {'HINCRBY', members, 'x', '1'}, {'HSCAN', members, '0'}, {'HLEN', members},
    {'HKEYS', members}, {'SADD', set, 'x'}, {'SREM', set, 'x'}, {'SPOP', set, '1'}, {'SCARD', set},
    {'HGETALL', nodes}, {'UNLINK', members, set, nodes, stream}, {'EXISTS', members, nodes, stream},
    {'TYPE', stream}, {'XADD', stream, '*', 'event', 'x'}, {'XRANGE', stream, '-', '+'}, {'XREVRANGE', stream, '+', '-'},
  }) do
    needed[#needed + 1] = command
  end
end
for i = 6, #ARGV do
  needed[#needed + 1] = {'SUBSCRIBE', ARGV[i]}
  needed[#needed + 1] = {'PUBLISH', ARGV[i], 'x'}
end
local forbidden, unavailable = {}, {}
for _, command in ipairs(needed) do
  local known, permitted = pcall(redis.acl_check_cmd, unpack(command))
  if not known then
    unavailable[#unavailable + 1] = 'the command ' .. command[1]
  elseif not permitted then
    forbidden[#forbidden + 1] = command[1] .. (command[2] and ' ' .. command[2] or '')
  end
end
-- The fields that epoch.lua reads to notice a loss of events.
local FIELDS = {server = {'run_id'}, replication = {'master_replid', 'master_replid2', 'connected_slaves'}}
if #unavailable == 0 and #forbidden == 0 then
  for section, fields in pairs(FIELDS) do
    local info = redis.pcall('INFO', section)
    if type(info) ~= 'string' then
      unavailable[#unavailable + 1] = 'INFO ' .. section .. ' in scripts (' .. tostring(info.err) .. ')'
    else
      for _, field in ipairs(fields) do
        if not string.find(info, field .. ':%w') then
          unavailable[#unavailable + 1] = field .. ' in INFO ' .. section
        end
      end
    end
  end
end
return {forbidden, unavailable}
