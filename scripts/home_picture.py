"Take the picture of the home page out of nbs/run_brightness.ipynb, where it was drawn from the run's own samples."
import base64
import json
from pathlib import Path

NBS = Path(__file__).parent.parent/'nbs'


def picture() -> bytes:
    "The last figure of the notebook: samples before training and after training in both directions"
    cells = json.loads((NBS/'run_brightness.ipynb').read_text(encoding='utf-8'))['cells']
    found = [o['data']['image/png'] for c in cells for o in c.get('outputs', []) if 'image/png' in o.get('data', {})]
    return base64.b64decode(''.join(found[-1]))


if __name__ == '__main__': (NBS/'images/brightness.png').write_bytes(picture())
