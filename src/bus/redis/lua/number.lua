-- Numbers of calls: `meta` has for each node a field `from:NODE` with the number of its last call and
-- its outcome, so that a retry is noticed. The last word of the field is the time, in seconds.

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
