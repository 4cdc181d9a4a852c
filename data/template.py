"""
How is a chat written down for a network? ChatML, which Qwen, SmolLM2 and most adaptations of them read:

    <|im_start|>user
    What is a noun?<|im_end|>
    <|im_start|>assistant
    A word for a thing.<|im_end|>
"""

START, END = "<|im_start|>", "<|im_end|>"
ROLES = ("system", "user", "assistant")


def chatml(messages, asks=False):
    """
    Text of [{"role", "content"}]. asks: it ends where an assistant begins to speak. Raises ValueError for a
    message with the marks of another in it: a user could speak for the assistant.
    """
    for message in messages:
        if START in message["content"] or END in message["content"]:
            raise ValueError(f"a message with {START} or {END} in it")
    parts = [f"{START}{m['role']}\n{m['content']}{END}\n" for m in messages]
    return "".join(parts) + (f"{START}assistant\n" if asks else "")


def messages_of(record):
    """
    The messages of a line of JSON, OpenAI's {"messages": [{"role", "content"}]} or ShareGPT's
    {"conversations": [{"from", "value"}]}. Raises ValueError for anything else.
    """
    other = {"human": "user", "gpt": "assistant", "chatgpt": "assistant", "bing": "assistant"}
    if not isinstance(record, dict):
        raise ValueError("no JSON object")
    if isinstance(record.get("messages"), list):
        turns = [
            (turn["role"], turn["content"]) for turn in record["messages"] if fits(turn, "role", "content")
        ]
    elif isinstance(record.get("conversations"), list):
        turns = [
            (turn["from"], turn["value"]) for turn in record["conversations"] if fits(turn, "from", "value")
        ]
    else:
        raise ValueError('neither "messages" nor "conversations"')
    found = [{"role": other.get(role, role), "content": text} for role, text in turns]
    if odd := [m["role"] for m in found if m["role"] not in ROLES]:
        raise ValueError(f"the role {odd[0]!r} is none of {', '.join(ROLES)}")
    if not any(m["role"] == "assistant" for m in found):
        raise ValueError("no assistant speaks")
    return found


def fits(turn, who, what):
    if (
        not isinstance(turn, dict)
        or not isinstance(turn.get(who), str)
        or not isinstance(turn.get(what), str)
    ):
        raise ValueError(f'a message that is not {{"{who}": ..., "{what}": ...}}')
    return True
