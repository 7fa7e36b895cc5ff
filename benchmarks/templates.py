# ruff: noqa: RUF001 -- DeepSeek writes its control tokens with wide bars
"""Chat templates by the rules of the families in `families.py`: which tokens open and end a turn,
who writes a system message, what reads the clock, who thinks and where. None is a copy.
"""

LLAMA_2 = """
{%- set start = 1 if messages[0]['role'] == 'system' else 0 -%}
{%- for message in messages[start:] -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('roles must alternate user, assistant, user, ...') -}}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{%- set before = '<<SYS>>\\n' + messages[0]['content'] + '\\n<</SYS>>\\n\\n' if start and loop.first
   else '' -%}
{{- bos_token + '[INST] ' + before + message['content'].strip() + ' [/INST]' -}}
{%- else -%}
{{- ' ' + message['content'].strip() + ' ' + eos_token -}}
{%- endif -%}
{%- endfor -%}
"""

LLAMA_3 = """
{{- bos_token -}}
{%- set today = strftime_now('%d %b %Y') if strftime_now is defined else '26 Jul 2024' -%}
{%- set system = messages[0]['content'] | trim if messages[0]['role'] == 'system' else '' -%}
{%- set rest = messages[1:] if messages[0]['role'] == 'system' else messages -%}
{{- '<|start_header_id|>system<|end_header_id|>\\n\\nToday Date: ' + today + '\\n\\n' + system
    + '<|eot_id|>' -}}
{%- for message in rest -%}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim
    + '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""

MISTRAL = """
{{- bos_token -}}
{%- set system = messages[0]['content'] if messages[0]['role'] == 'system' else '' -%}
{%- set rest = messages[1:] if messages[0]['role'] == 'system' else messages -%}
{%- for message in rest -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('after the optional system message, roles must alternate') -}}
{%- endif -%}
{%- if message['role'] == 'user' -%}
{%- set before = system + '\\n\\n' if system and loop.revindex0 < 2 else '' -%}
{{- '[INST] ' + before + message['content'] + '[/INST]' -}}
{%- else -%}
{{- ' ' + message['content'] + eos_token -}}
{%- endif -%}
{%- endfor -%}
"""

QWEN_2_5 = """
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""

QWEN_3 = """
{%- set last = namespace(user=0) -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- set content = message['content'] -%}
{%- if message['role'] == 'assistant' -%}
{%- set thought = '' -%}
{%- if '</think>' in content -%}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') -%}
{%- set content = content.split('</think>')[-1].lstrip('\\n') -%}
{%- endif -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if loop.index0 > last.user and (loop.last or thought) -%}
{{- '<think>\\n' + thought + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- content + '<|im_end|>\\n' -}}
{%- else -%}
{{- '<|im_start|>' + message['role'] + '\\n' + content + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' -}}
{%- if enable_thinking is defined and enable_thinking is false -%}
{{- '<think>\\n\\n</think>\\n\\n' -}}
{%- endif -%}
{%- endif -%}
"""

GEMMA_3 = """
{{- bos_token -}}
{%- set before = messages[0]['content'] + '\\n\\n' if messages[0]['role'] == 'system' else '' -%}
{%- set rest = messages[1:] if messages[0]['role'] == 'system' else messages -%}
{%- for message in rest -%}
{%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') -}}
{%- endif -%}
{%- set role = 'model' if message['role'] == 'assistant' else message['role'] -%}
{{- '<start_of_turn>' + role + '\\n' + (before if loop.first else '') + message['content'] | trim
    + '<end_of_turn>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<start_of_turn>model\\n' -}}{%- endif -%}
"""

GLM_4_5 = """
{{- '[gMASK]<sop>' -}}
{%- set last = namespace(user=0) -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{%- set last.user = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- '<|user|>\\n' + message['content'] -}}
{%- if enable_thinking is defined and not enable_thinking -%}{{- '/nothink' -}}{%- endif -%}
{%- elif message['role'] == 'assistant' -%}
{%- set content, thought = message['content'], '' -%}
{%- if '</think>' in content -%}
{%- set thought = content.split('</think>')[0].split('<think>')[-1] -%}
{%- set content = content.split('</think>')[-1] -%}
{%- endif -%}
{{- '<|assistant|>\\n<think>' + (thought.strip() if loop.index0 > last.user else '')
    + '</think>' -}}
{%- if content.strip() -%}{{- '\\n' + content.strip() -}}{%- endif -%}
{%- else -%}
{{- '<|' + message['role'] + '|>\\n' + message['content'] -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|assistant|>' -}}
{%- if enable_thinking is defined and not enable_thinking -%}
{{- '\\n<think></think>' -}}
{%- endif -%}
{%- endif -%}
"""

DEEPSEEK_R1 = """
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'system' -%}{{- message['content'] -}}
{%- elif message['role'] == 'user' -%}{{- '<｜User｜>' + message['content'] -}}
{%- else -%}
{{- '<｜Assistant｜>' + message['content'].split('</think>')[-1] + '<｜end▁of▁sentence｜>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<｜Assistant｜><think>\\n' -}}{%- endif -%}
"""

SMOLLM_3 = """
{%- set think = enable_thinking is not defined or enable_thinking -%}
{%- set mode = '/think' if think else '/no_think' -%}
{{- '<|im_start|>system\\n## Metadata\\n\\nToday Date: ' + strftime_now('%d %B %Y')
    + '\\nReasoning Mode: ' + mode + '\\n\\n' -}}
{{- (messages[0]['content'] if messages[0]['role'] == 'system' else 'You are SmolLM.')
    + '<|im_end|>\\n' -}}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}
{{- '<|im_start|>user\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- elif message['role'] == 'assistant' -%}
{{- '<|im_start|>assistant\\n' + ('' if think else '<think>\\n\\n</think>\\n')
    + message['content'].lstrip('\\n') + '<|im_end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
{{- '<|im_start|>assistant\\n' + ('' if think else '<think>\\n\\n</think>\\n') -}}
{%- endif -%}
"""

GPT_OSS = """
{{- '<|start|>system<|message|>Current date: ' + strftime_now('%Y-%m-%d') + '\\n\\nReasoning: '
    + (reasoning_effort if reasoning_effort is defined else 'medium')
    + '\\n\\n# Valid channels: analysis, final.<|end|>' -}}
{%- for message in messages -%}
{%- if message['role'] in ('system', 'developer') -%}
{{- '<|start|>developer<|message|># Instructions\\n\\n' + message['content'] + '<|end|>' -}}
{%- elif message['role'] == 'user' -%}
{{- '<|start|>user<|message|>' + message['content'] + '<|end|>' -}}
{%- elif loop.last and not add_generation_prompt -%}
{%- if message.get('thinking') -%}
{{- '<|start|>assistant<|channel|>analysis<|message|>' + message['thinking'] + '<|end|>' -}}
{%- endif -%}
{{- '<|start|>assistant<|channel|>final<|message|>' + message['content'] + '<|return|>' -}}
{%- else -%}
{{- '<|start|>assistant<|channel|>final<|message|>' + message['content'] + '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start|>assistant' -}}{%- endif -%}
"""

OLMO_3 = """
{%- if messages[0]['role'] != 'system' -%}
{{- '<|im_start|>system\\nYou are a helpful AI assistant.<|im_end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{{- '<|im_start|>assistant\\n' + message['content'] -}}
{%- if loop.last -%}{{- eos_token -}}{%- else -%}{{- '<|im_end|>\\n' -}}{%- endif -%}
{%- else -%}
{{- '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' -}}
{%- endif -%}
{%- if loop.last and add_generation_prompt -%}{{- '<|im_start|>assistant\\n<think>' -}}{%- endif -%}
{%- endfor -%}
"""
