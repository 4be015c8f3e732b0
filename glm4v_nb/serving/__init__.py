"""A service that answers as OpenAI's chat completions do: ``glm4v-nb serve CHECKPOINT``.

Why not ``transformers serve`` (tried and read in 5.23): it takes classes of transformers' own and
not those that a package registers ("does not recognize this architecture"); of models with images
it answers one request at a time; it hands the addresses that a client names to the processor; and
it has no bound on its queue, no key and no limit on what a request takes. What is kept is FastAPI,
uvicorn and Prometheus' client; of transformers the cache's interface and the warpers of logits; of
tokenizers the decoding of streams.

A body goes one way: ``app`` reads it, ``service`` makes a ``job`` of it as ``protocol`` says, the
``engine`` runs it in a row of the ``cache``, which has the size that ``capacity`` found to fit.
"""
