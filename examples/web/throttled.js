// What fetching would be like on a slower connection.

const PIECE = 2048;

/** A `fetch` whose files come with so many bytes a second. */
export function throttled(bytesPerSecond) {
  return async (...request) => {
    const response = await fetch(...request);
    const slow = new TransformStream({
      async transform(chunk, controller) {
        for (let at = 0; at < chunk.length; at += PIECE) {
          const piece = chunk.subarray(at, at + PIECE);
          await new Promise((resolve) => setTimeout(resolve, (1000 * piece.length) / bytesPerSecond));
          controller.enqueue(piece);
        }
      },
    });
    const { status, statusText, headers } = response;
    return new Response(response.body?.pipeThrough(slow), { status, statusText, headers });
  };
}
