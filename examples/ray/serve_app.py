"""Ray Serve: replicas that own an engine each.

    serve run examples.ray.serve_app:app

POST /generate takes the request object of every other door ({"prompt": ..., "length": ...,
"schedule": ..., "seed": ...}) and answers with its result; POST /stream answers with one JSON object
a line: final text as it becomes final, what may still change, and the result.

Environment: REDRAFT_MODEL (a model directory), REDRAFT_THREADS (CPU threads of a replica).
"""

import json
import os
from typing import Any, AsyncIterator

import redraft
from fastapi import FastAPI, HTTPException, Request
from ray import serve
from starlette.responses import StreamingResponse

MODEL = os.environ.get("REDRAFT_MODEL", "models/redraft-stories-10m")
THREADS = int(os.environ.get("REDRAFT_THREADS", "1"))

web = FastAPI()


@serve.deployment(
    ray_actor_options={"num_cpus": THREADS},
    # More than the engine batches (max_sequences) would wait inside a replica, where no other can take it.
    max_ongoing_requests=8,
    autoscaling_config={
        "min_replicas": int(os.environ.get("REDRAFT_MIN_REPLICAS", "1")),
        "max_replicas": int(os.environ.get("REDRAFT_MAX_REPLICAS", "4")),
        "target_ongoing_requests": 4,
        "upscale_delay_s": 2,
    },
    health_check_period_s=5,
)
@serve.ingress(web)
class Writer:
    """An engine, and the requests in flight in it: they share its forwards."""

    def __init__(self, model: str = MODEL, threads: int = THREADS) -> None:
        self.engine = redraft.Engine(os.path.abspath(model), device="cpu", threads=threads)

    def check_health(self) -> None:
        # An engine that ended raises here; Ray then replaces the replica.
        _ = self.engine.stats

    @web.post("/generate")
    async def generate(self, request: Request) -> dict[str, Any]:
        asked = await request.json()
        try:
            generation = await self.engine.agenerate(asked.pop("prompt", None), **asked)
        except (redraft.RequestError, TypeError) as error:
            raise HTTPException(400, str(error)) from error
        return generation.to_dict()

    @web.post("/stream")
    async def stream(self, request: Request) -> StreamingResponse:
        asked = await request.json()
        try:
            events = self.engine.astream(asked.pop("prompt", None), **asked)
        except (redraft.RequestError, TypeError) as error:
            raise HTTPException(400, str(error)) from error
        return StreamingResponse(self.lines(events), media_type="application/x-ndjson")

    @staticmethod
    async def lines(events: AsyncIterator[redraft.Event]) -> AsyncIterator[str]:
        """Events as lines of JSON. A client that goes away ends this, which cancels the request."""
        try:
            async for event in events:
                if isinstance(event, redraft.Delta):
                    yield json.dumps({"delta": event.text}) + "\n"
                elif isinstance(event, redraft.Snapshot):
                    yield json.dumps({"provisional": event.text, "stage": event.stage}) + "\n"
                else:
                    yield json.dumps({"done": event.generation.to_dict()}) + "\n"
        except redraft.RedraftError as error:
            yield json.dumps({"error": str(error)}) + "\n"


app = Writer.bind()
