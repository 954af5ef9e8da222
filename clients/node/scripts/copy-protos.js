// Puts the contract inside the package before it is packed; in the repository the client reads it where it lies.
import { cpSync } from 'node:fs';
import { fileURLToPath } from 'node:url';

const from = fileURLToPath(new URL('../../../protos/shoplm', import.meta.url));
const to = fileURLToPath(new URL('../protos/shoplm', import.meta.url));
cpSync(from, to, { recursive: true });
