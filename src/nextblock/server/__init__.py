"""An OpenAI endpoint for one model on one machine, and a page that shows how it decodes.

Imports from workflows and below. Start reading at `app`, which takes a request, and `batching`, whose one thread
decodes all of them together.
"""
