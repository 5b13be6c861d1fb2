-- KEYS[1] a channel P:{C}, KEYS[2] the node's own Pub/Sub channel, KEYS[3] P:settings. ARGV: the bare channels.
-- Answers {commands that this user may not call, commands and INFO fields that this Redis does not have}, in words.
local name, meta, events = KEYS[1], KEYS[1] .. ':meta', KEYS[1] .. ':events'
local mark = string.match(name, '^(.-):{') .. ':epoch'
local needed = {
  {'SUBSCRIBE', name, name .. ':to', KEYS[2]},
  {'UNSUBSCRIBE'},
  {'PUBLISH', name, 'x'},
  {'PUBLISH', name .. ':to', 'x'},
  {'PUBLISH', KEYS[2], 'x'},
  {'PING'}, {'TIME'}, {'INFO'},
  {'HMGET', meta, 'head'}, {'HSET', meta, 'head', '1'}, {'HDEL', meta, 'head'}, {'PEXPIRE', meta, '1'},
  {'HMGET', mark, 'epoch'}, {'HSET', mark, 'epoch', 'x'}, {'DEL', mark},
  {'XADD', events, '*', 'e', 'x'}, {'XRANGE', events, '-', '+'}, {'XREVRANGE', events, '+', '-'},
  {'XTRIM', events, 'MINID', '1'}, {'XLEN', events}, {'PEXPIRE', events, '1'}, {'DEL', events},
  {'HGET', meta, 'from:x'}, {'HGETALL', meta},
  {'GET', name .. ':key:x'}, {'SET', name .. ':key:x', 'x'},
  {'TYPE', KEYS[3]}, {'DEL', KEYS[3]}, {'HSET', KEYS[3], 'x', 'x'}, {'PEXPIRE', KEYS[3], '1'},
}
for _, bare in ipairs(ARGV) do
  needed[#needed + 1] = {'SUBSCRIBE', bare}
  needed[#needed + 1] = {'PUBLISH', bare, 'x'}
end
local refused, lacking = {}, {}
for _, command in ipairs(needed) do
  local known, permitted = pcall(redis.acl_check_cmd, unpack(command))
  if not known then
    lacking[#lacking + 1] = 'the command ' .. command[1]
  elseif not permitted then
    refused[#refused + 1] = command[1] .. (command[2] and ' ' .. command[2] or '')
  end
end
-- The fields that run.lua reads to notice a loss of events.
local FIELDS = {server = {'run_id'}, replication = {'master_replid', 'master_replid2', 'connected_slaves'}}
if #lacking == 0 and #refused == 0 then
  for section, fields in pairs(FIELDS) do
    local info = redis.pcall('INFO', section)
    if type(info) ~= 'string' then
      lacking[#lacking + 1] = 'INFO ' .. section .. ' in scripts (' .. tostring(info.err) .. ')'
    else
      for _, field in ipairs(fields) do
        if not string.find(info, field .. ':%w') then
          lacking[#lacking + 1] = field .. ' in INFO ' .. section
        end
      end
    end
  end
end
return {refused, lacking}
