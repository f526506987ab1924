"""The official `openai` client: nothing of Isthmus is needed on the client's side.

ISTHMUS_URL=http://127.0.0.1:8000 python docs/integrations/openai_client.py
"""

import os

from openai import OpenAI


def similarities(url: str, query: str, texts: list[str]) -> list[float]:
    """The cosine similarity of a query and each text; the vectors are of unit length."""
    with OpenAI(base_url=f"{url}/v1", api_key=os.environ.get("ISTHMUS_API_KEY", "unused")) as client:
        model = client.models.list().data[0].id
        answer = client.embeddings.create(model=model, input=[query, *texts])
    asked, *others = [each.embedding for each in answer.data]
    return [sum(a * b for a, b in zip(asked, other, strict=True)) for other in others]


if __name__ == "__main__":
    texts = ["a dog on a beach", "rain on a tin roof", "a puppy by the sea"]
    url = os.environ.get("ISTHMUS_URL", "http://127.0.0.1:8000")
    for text, similarity in zip(texts, similarities(url, "a dog at the seaside", texts), strict=True):
        print(f"{similarity:.3f}  {text}")
