"Write README.md from nbs/index.ipynb: prose as it is, code and printed output fenced."
import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def readme() -> str:
    parts = []
    for cell in json.loads((ROOT/'nbs/index.ipynb').read_text())['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] == 'markdown':
            source = source.replace('](images/', '](nbs/images/')
            parts.append(re.sub(r'\]\((\w+\.ipynb)\)', r'](nbs/\1)', source))
            continue
        parts.append(f'```python\n{source}\n```')
        text = ''.join(''.join(o['text']) for o in cell['outputs'] if o['output_type'] == 'stream' and o['name'] == 'stdout')
        if text: parts.append('```\n' + text.rstrip() + '\n```')
    return '\n\n'.join(parts) + '\n'


if __name__ == '__main__': (ROOT/'README.md').write_text(readme())
