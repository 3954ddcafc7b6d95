$ErrorActionPreference = 'Stop'
$WarningPreference = 'SilentlyContinue'

# Codes of Fail: request, busy, store-missing, access-denied, key-missing, account-missing,
# account-broad, key-file, iis-missing, site-missing, central-store, sharing, changed, former-missing,
# read-back.
function Fail([string] $code, [string] $detail) {
    $failure = New-Object System.Exception $code
    $failure.Data['code'] = $code
    $failure.Data['detail'] = $detail
    throw $failure
}

function Read-Request {
    $line = [Console]::In.ReadLine()
    try {
        Add-Type -AssemblyName System.Web.Extensions
        $reader = New-Object System.Web.Script.Serialization.JavaScriptSerializer
        $reader.MaxJsonLength = 16777216
        $parsed = $reader.DeserializeObject($line)
    } catch {
        Fail 'request' '' # the exception would quote the request
    }
    if ($parsed['contract'] -ne 1) { Fail 'request' '' }
    return $parsed
}

function Get-Hex([byte[]] $bytes) {
    if ($null -eq $bytes) { return '' }
    return [BitConverter]::ToString($bytes).Replace('-', '')
}

function Get-Sha256($certificate) {
    return Get-Hex ((New-Object System.Security.Cryptography.SHA256CryptoServiceProvider).ComputeHash($certificate.RawData))
}

function Open-Store([string] $name, [string] $location, [string] $flags) {
    $store = New-Object System.Security.Cryptography.X509Certificates.X509Store $name, ([Security.Cryptography.X509Certificates.StoreLocation] $location)
    try {
        $store.Open([Security.Cryptography.X509Certificates.OpenFlags] $flags)
    } catch {
        if ($_.Exception.GetBaseException().HResult -eq -2147024894) { Fail 'store-missing' $name }
        throw
    }
    return $store
}

function Find-Certificate($store, [string] $thumbprint) {
    foreach ($certificate in $store.Certificates) {
        if ($certificate.Thumbprint -eq $thumbprint) { return $certificate }
    }
    return $null
}

# A mark records that the agent imported a certificate, and for which target: a registry key named after
# its thumbprint. The friendly name cannot be the mark, since operators choose it.
function Open-Marks($request, [string] $store) {
    $hive = [Microsoft.Win32.Registry]::LocalMachine
    if ($request['location'] -eq 'CurrentUser') { $hive = [Microsoft.Win32.Registry]::CurrentUser }
    return $hive.CreateSubKey('SOFTWARE\certctl-agent').CreateSubKey($store)
}

# Reading the marks creates no registry keys.
function Get-Marked($request, [string] $store, [string] $target) {
    $hive = [Microsoft.Win32.Registry]::LocalMachine
    if ($request['location'] -eq 'CurrentUser') { $hive = [Microsoft.Win32.Registry]::CurrentUser }
    $root = $hive.OpenSubKey('SOFTWARE\certctl-agent')
    if ($null -eq $root) { return }
    $marks = $root.OpenSubKey($store)
    if ($null -eq $marks) { return }
    foreach ($thumbprint in $marks.GetSubKeyNames()) {
        if ([string] $marks.OpenSubKey($thumbprint).GetValue('target') -ceq $target) { $thumbprint }
    }
}

# The mark is set before the certificate is imported, so a certificate without a mark is never ours.
function Set-Mark($request, [string] $store, [string] $thumbprint, [string] $target) {
    $mark = (Open-Marks $request $store).CreateSubKey($thumbprint)
    $mark.SetValue('target', $target)
    $mark.SetValue('at', [DateTime]::UtcNow.ToString('s'))
}

function Get-MarkTime($request, [string] $store, [string] $thumbprint) {
    return [string] (Open-Marks $request $store).CreateSubKey($thumbprint).GetValue('at')
}

function Get-Ours($request) {
    $store = Open-Store $request['store'] $request['location'] 'OpenExistingOnly, ReadOnly'
    foreach ($thumbprint in @(Get-Marked $request $request['store'] $request['target'])) {
        if ($null -ne (Find-Certificate $store $thumbprint)) { $thumbprint }
    }
}

# Removes a marked certificate, its private key, and then the mark.
function Remove-Marked($request, [string] $name, [string] $thumbprint) {
    $store = Open-Store $name $request['location'] 'OpenExistingOnly, ReadWrite'
    $certificate = Find-Certificate $store $thumbprint
    if ($null -ne $certificate) {
        if ($certificate.HasPrivateKey) {
            $path = [IO.Path]::Combine('Cert:\', $request['location'], $name, $thumbprint)
            Remove-Item -LiteralPath $path -DeleteKey
        } else {
            $store.Remove($certificate)
        }
    }
    (Open-Marks $request $name).DeleteSubKeyTree($thumbprint, $false)
}

function Get-Chain($request) {
    foreach ($der in $request['chain']) {
        New-Object System.Security.Cryptography.X509Certificates.X509Certificate2 (, [Convert]::FromBase64String($der))
    }
}

function Add-Chain($request) {
    $store = Open-Store 'CA' $request['location'] 'OpenExistingOnly, ReadWrite'
    foreach ($certificate in @(Get-Chain $request)) {
        if ($null -eq (Find-Certificate $store $certificate.Thumbprint)) {
            Set-Mark $request 'CA' $certificate.Thumbprint 'chain'
            $store.Add($certificate)
        }
    }
}

# Removes our intermediate certificates that issued none of the certificates in the stores.
function Remove-UnusedChain($request) {
    $marked = @(Get-Marked $request 'CA' 'chain')
    if ($marked.Count -eq 0) { return }
    $authorities = Open-Store 'CA' $request['location'] 'OpenExistingOnly, ReadOnly'
    foreach ($thumbprint in $marked) {
        $authority = Find-Certificate $authorities $thumbprint
        $used = $false
        if ($null -ne $authority) {
            foreach ($name in @('My', 'WebHosting', 'CA', $request['store'])) {
                try {
                    $store = Open-Store $name $request['location'] 'OpenExistingOnly, ReadOnly'
                } catch {
                    continue # the host has no such store
                }
                foreach ($certificate in $store.Certificates) {
                    if ($certificate.Thumbprint -ne $thumbprint -and $certificate.Issuer -eq $authority.Subject) { $used = $true }
                }
            }
        }
        if (-not $used) { Remove-Marked $request 'CA' $thumbprint }
    }
}

function Import-Certificate($request) {
    $store = Open-Store $request['store'] $request['location'] 'OpenExistingOnly, ReadWrite'
    $there = Find-Certificate $store $request['thumbprint']
    if ($null -ne $there -and $there.HasPrivateKey) { return }
    $flags = 'MachineKeySet, PersistKeySet'
    if ($request['location'] -eq 'CurrentUser') { $flags = 'UserKeySet, PersistKeySet' }
    $storage = [Security.Cryptography.X509Certificates.X509KeyStorageFlags] $flags
    if ($request['exportable']) { $storage = $storage -bor [Security.Cryptography.X509Certificates.X509KeyStorageFlags]::Exportable }
    if ($null -eq $there) { Set-Mark $request $request['store'] $request['thumbprint'] $request['target'] }
    $read = New-Object System.Security.Cryptography.X509Certificates.X509Certificate2Collection
    $read.Import([Convert]::FromBase64String($request['pfx']), $request['password'], $storage)
    foreach ($certificate in $read) {
        if ($certificate.Thumbprint -eq $request['thumbprint']) {
            if ($request['friendly_name'] -ne '') { $certificate.FriendlyName = $request['friendly_name'] }
            $store.Add($certificate)
        }
    }
}

# Returns the file of a private key of either kind of provider.
function Get-KeyFile($certificate) {
    $key = [Security.Cryptography.X509Certificates.RSACertificateExtensions]::GetRSAPrivateKey($certificate)
    if ($null -eq $key) { $key = [Security.Cryptography.X509Certificates.ECDsaCertificateExtensions]::GetECDsaPrivateKey($certificate) }
    if ($null -eq $key) { Fail 'key-file' $certificate.Thumbprint }
    if ($key -is [Security.Cryptography.RSACryptoServiceProvider]) {
        $name = $key.CspKeyContainerInfo.UniqueKeyContainerName
    } else {
        $name = $key.Key.UniqueName
    }
    $data = [Environment]::GetFolderPath('CommonApplicationData')
    foreach ($folder in @('Microsoft\Crypto\Keys', 'Microsoft\Crypto\RSA\MachineKeys')) {
        $file = [IO.Path]::Combine($data, $folder, $name)
        if ([IO.File]::Exists($file)) { return $file }
    }
    Fail 'key-file' $certificate.Thumbprint
}

# Accounts that may get access to a key: single services, application pools and virtual machines;
# Administrators and IIS_IUSRS; users and groups that an administrator created. Groups whose members
# Windows manages are not allowed, since some include everyone
# (https://learn.microsoft.com/en-us/windows-server/identity/ad-ds/manage/understand-security-identifiers).
$readers = '^S-1-5-(18|19|20|32-544|32-568|8[0-3](-\d+){2,}|21-.*-(500|512|\d{4,}))$'

function Get-Sid([string] $account) {
    try {
        if ($account.StartsWith('S-1-')) {
            $sid = New-Object System.Security.Principal.SecurityIdentifier $account
        } else {
            $sid = (New-Object System.Security.Principal.NTAccount $account).Translate([Security.Principal.SecurityIdentifier])
        }
    } catch {
        Fail 'account-missing' $account
    }
    if (-not [regex]::IsMatch($sid.Value, $readers)) { Fail 'account-broad' $account }
    return $sid
}

function Test-Reader([string] $file, $sid) {
    $read = [Security.AccessControl.FileSystemRights]::Read
    foreach ($rule in [IO.File]::GetAccessControl($file).GetAccessRules($true, $true, [Security.Principal.SecurityIdentifier])) {
        if ($rule.IdentityReference.Value -eq $sid.Value -and $rule.AccessControlType -eq 'Allow' -and ($rule.FileSystemRights -band $read) -eq $read) { return $true }
    }
    return $false
}

function Get-Unread($request, $certificate) {
    foreach ($account in $request['key_readers']) {
        $sid = Get-Sid $account
        if (-not (Test-Reader (Get-KeyFile $certificate) $sid)) { $account }
    }
}

# Grants accounts read access to the key of a certificate, or revokes it.
function Set-Readers($certificate, $accounts, [bool] $readable) {
    foreach ($account in $accounts) {
        $file = Get-KeyFile $certificate
        $rule = New-Object System.Security.AccessControl.FileSystemAccessRule (Get-Sid $account), 'Read', 'Allow'
        $access = [IO.File]::GetAccessControl($file)
        if ($readable) { $access.AddAccessRule($rule) } else { $access.RemoveAccessRuleSpecific($rule) }
        [IO.File]::SetAccessControl($file, $access)
    }
}
