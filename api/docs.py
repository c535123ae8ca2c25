"""`/openapi.json`, and a page that shows it, from files that come with a dependency: nothing is
fetched from elsewhere."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from api import openapi

router = APIRouter(include_in_schema=False)

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Skipline: the HTTP interface</title>
<link rel="icon" href="/docs/favicon-32x32.png">
<link rel="stylesheet" href="/docs/swagger-ui.css">
</head>
<body>
<div id="docs"></div>
<script src="/docs/swagger-ui-bundle.js"></script>
<script src="/docs/start.js"></script>
</body>
</html>
"""
START = 'SwaggerUIBundle({url: "/openapi.json", dom_id: "#docs", deepLinking: true});\n'
JAVASCRIPT = "text/javascript"
VENDORED = {
    "swagger-ui-bundle.js": JAVASCRIPT,
    "swagger-ui.css": "text/css",
    "favicon-32x32.png": "image/png",
}


@router.get("/openapi.json")
def openapi_document(request: Request) -> Response:
    """The OpenAPI document, made once."""
    app = request.app
    if app.openapi_schema is None:
        app.openapi_schema = openapi.build(app)
    return JSONResponse(app.openapi_schema)


@router.get("/docs")
async def page() -> Response:
    """The page. It may load what this server has and nothing else."""
    headers = {"Content-Security-Policy": CONTENT_SECURITY_POLICY, "Referrer-Policy": "no-referrer"}
    return Response(PAGE, headers=headers, media_type="text/html")


@router.get("/docs/{name}")
def page_file(name: str) -> Response:
    """One of the page's files, of a fixed list."""
    headers = {"Cache-Control": "max-age=3600"}
    if name == "start.js":
        return Response(START, headers=headers, media_type=JAVASCRIPT)
    if name not in VENDORED:
        raise HTTPException(404)
    content = (files("fastapi_swagger") / "resources" / name).read_bytes()
    return Response(content, headers=headers, media_type=VENDORED[name])
