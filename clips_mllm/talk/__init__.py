"""Talking to a multimodal LLM: one engine under the terminal, the browser and the endpoint.

    messages + images --prompt--> Prompt --engine--> pieces of text
                                      ^ prefixes: keys and values of what was encoded before

Terminal and browser keep a `Conversation`; the endpoint gets the whole of it with each request.
"""
