-- KEYS[1] a channel P:{C}, KEYS[2] the node's own Pub/Sub channel, KEYS[3] P:settings. ARGV: the bare channels.
-- Answers what this user may not do: better told at once than found out one by one.
local name, meta, events, from = KEYS[1], KEYS[1] .. ':meta', KEYS[1] .. ':events', KEYS[1] .. ':from:x'
local mark = string.match(name, '^(.-):{') .. ':epoch'
local needed = {
  {'SUBSCRIBE', name, name .. ':to', KEYS[2]},
  {'UNSUBSCRIBE'},
  {'PUBLISH', name, 'x'},
  {'PUBLISH', name .. ':to', 'x'},
  {'PUBLISH', KEYS[2], 'x'},
  {'PING'}, {'TIME'}, {'INFO'},
  {'HMGET', meta, 'head'}, {'HSET', meta, 'head', '1'}, {'HDEL', meta, 'head'}, {'PEXPIRE', meta, '1'},
  {'HMGET', mark, 'epoch'}, {'HSET', mark, 'epoch', 'x'},
  {'XADD', events, '*', 'e', 'x'}, {'XRANGE', events, '-', '+'}, {'XREVRANGE', events, '+', '-'},
  {'XTRIM', events, 'MAXLEN', '1'}, {'PEXPIRE', events, '1'}, {'DEL', events},
  {'GET', from}, {'SET', from, 'x'},
  {'TYPE', KEYS[3]}, {'DEL', KEYS[3]}, {'HSET', KEYS[3], 'x', 'x'}, {'PEXPIRE', KEYS[3], '1'},
}
for _, bare in ipairs(ARGV) do
  needed[#needed + 1] = {'SUBSCRIBE', bare}
  needed[#needed + 1] = {'PUBLISH', bare, 'x'}
end
local refused = {}
for _, command in ipairs(needed) do
  if not redis.acl_check_cmd(unpack(command)) then
    refused[#refused + 1] = command[1] .. (command[2] and ' ' .. command[2] or '')
  end
end
return refused
