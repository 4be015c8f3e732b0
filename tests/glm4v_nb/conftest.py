"""A service that is asked: a module's own fixture ``served`` starts it."""

import pytest


@pytest.fixture(scope="module")
def service(served):
    return served[0]


@pytest.fixture(scope="module")
def client(served):
    """OpenAI's, which does not try again."""
    import openai

    with openai.OpenAI(base_url=served[1] + "/v1", api_key="none", max_retries=0) as one:
        yield one


@pytest.fixture(scope="module")
def http(client):
    """The client's own HTTP client, for what the openai client would not send."""
    return client._client
