"""A service that answers as OpenAI's chat completions do: ``glm4v-nb serve CHECKPOINT``.

Why not ``transformers serve`` (looked at in 5.23): it takes classes from transformers' own modules
and not those that a package registers; it batches continuously for text-only models alone, and asks
others for paged attention; it fetches the images that a client names; and it has no bound on its
queue, no key and no limit on what a request takes. What is kept is FastAPI, uvicorn and Prometheus'
client; of transformers the cache's interface and the warpers of logits; of tokenizers the decoding
of streams.

A body goes one way: ``app`` reads it, ``service`` makes a ``job`` of it as ``protocol`` says, the
``engine`` runs it in a row of the ``cache``, which has the size that ``capacity`` found to fit.
"""
