"""Chat with a multimodal LLM: one engine for the terminal, the browser and the HTTP endpoint.

    messages + images --prompt--> Prompt --engine, with the prefix cache--> text deltas

Terminal and browser keep a conversation; the endpoint receives the whole conversation with each request.
"""
